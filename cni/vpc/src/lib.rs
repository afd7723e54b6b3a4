//! A VPC in a box: the small AWS that the demo, the tests and rehearsals run on.

pub mod netns;
