//! A VPC in a box: the small AWS that the demo, the tests and rehearsals run on.
//!
//! [`spec`] says what it is made of. [`run`](mod@run) composes it: [`claim`] writes down what is
//! taken of the machine, [`fabric`] makes the namespaces and the router that drops what EC2 has
//! not assigned, [`world`] is what EC2 knows, and [`cloud`] keeps the two in step. On top answer
//! the EC2 API, the instance metadata service, the [`resolver`] and the pretended [`internet`].
//! [`netns`] is the ground under all of it, and of use to whoever builds on a box: pods'
//! namespaces, and processes in them.

pub mod claim;
pub mod cloud;
mod credentials;
mod ec2;
pub mod fabric;
mod http;
pub mod internet;
mod metadata;
pub mod netns;
pub mod resolver;
pub mod run;
pub mod spec;
mod throttle;
pub mod world;
