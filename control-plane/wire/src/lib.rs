//! The protocols between Turnpike's parts: generated messages, and the clients that speak them.
//!
//! [`mesh`] carries the types of `turnpike-rules` over delta ADS ([`discovery`]); [`resource`]
//! turns one into the other at the edge, so that no generated type travels further into a program.
//! [`node`] is spoken on a node's Unix sockets, [`audit`] between a gate and the central record,
//! [`ca`] between a workload and the CA.
//!
//! A process of the data plane, in order: [`channel`] takes it to the controller, [`ca_client`]
//! gets and renews its certificate, [`ads`] subscribes to what it must know, [`names`] says how
//! each thing is called.

#[allow(
    clippy::all,
    clippy::too_many_lines,
    clippy::allow_attributes_without_reason,
    missing_debug_implementations,
    unreachable_pub,
    unused_qualifications,
    reason = "generated"
)]
mod generated {
    pub mod mesh {
        tonic::include_proto!("turnpike.mesh.v1");
    }
    pub mod node {
        tonic::include_proto!("turnpike.node.v1");
    }
    pub mod audit {
        tonic::include_proto!("turnpike.audit.v1");
    }
    pub mod envoy {
        pub mod service {
            pub mod discovery {
                pub mod v3 {
                    tonic::include_proto!("envoy.service.discovery.v3");
                }
            }
        }
        pub mod config {
            pub mod core {
                pub mod v3 {
                    tonic::include_proto!("envoy.config.core.v3");
                }
            }
        }
    }
    pub mod google {
        pub mod rpc {
            tonic::include_proto!("google.rpc");
        }
    }
    pub mod istio {
        tonic::include_proto!("istio.v1.auth");
    }
}

pub mod ads;
pub mod backoff;
pub mod ca_client;
pub mod channel;
pub mod names;
pub mod resource;

pub use generated::{
    audit, envoy::config::core::v3 as core, envoy::service::discovery::v3 as discovery,
};
pub use generated::{google::rpc, istio as ca, mesh, node};
