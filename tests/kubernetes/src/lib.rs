//! A real two-node Kubernetes whose nodes are instances of the VPC in a box.
//!
//! 1. [`build`] makes Kubernetes, etcd, CoreDNS, helm and two plugins of their Go modules, once per
//!    machine, into a cache folder;
//! 2. [`images`] makes container images of our own programs and of a few of the machine's, by
//!    hand: no registry is asked;
//! 3. [`Cluster::up`] starts the VPC, a control plane on the instance `control`, and on `node-a`
//!    and `node-b` what a machine of a cluster runs: containerd, kubelet, kube-proxy, each [`node`]
//!    with files, processes and a host name of its own. No pod network is installed: that is for
//!    the chart to bring, and until then the nodes are not ready;
//! 4. [`kubectl`] and [`chart`] are what a user has: kubectl and helm, run where the API server is
//!    reached, since nothing of it is reached from the machine's own network;
//! 5. [`tour`] shows the whole of it in four steps, for the demo;
//! 6. dropping the cluster takes it down; what a killed run left, the next one removes.

pub mod build;
pub mod certificates;
pub mod cgroup;
pub mod chart;
pub mod cluster;
pub mod control;
pub mod images;
pub mod kubectl;
pub mod node;
pub mod tokens;
pub mod tour;
pub mod workloads;

pub use cluster::{Cluster, Options};
pub use kubectl::{Kubectl, Said};
