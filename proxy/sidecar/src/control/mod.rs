//! The control side: configuration from the control plane, identity, the snapshot on disk.
