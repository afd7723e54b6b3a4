//! What every process of ours that stays has in common, and nothing of what it is for.
//!
//! In the order of its life: [`log`] begins, [`signals`] tell when to end, [`tasks`] run beside each
//! other and are missed when one ends, [`pages`] show the process to people, kubelet and Prometheus,
//! and [`slots`] keep those who hold connections from keeping out others.

pub mod log;
pub mod pages;
pub mod signals;
pub mod slots;
pub mod tasks;
