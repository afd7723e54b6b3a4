//! The facts, each kind with the indexes that answer "who depends on this?" without a walk.

mod pods;
mod policies;
mod routes;
mod services;

pub(crate) use pods::Pods;
pub(crate) use policies::{Policies, Selected, TrafficPolicies};
pub(crate) use routes::Routes;
pub(crate) use services::{Services, Slices};
