//! Resources by their names, put together from the facts when they are asked for.

mod destination;
mod node;
mod pod;
mod service;
