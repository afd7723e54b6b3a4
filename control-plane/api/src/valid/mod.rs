//! What was typed becomes what is valid.
