//! Request paths in the one form that is authorised and forwarded.
