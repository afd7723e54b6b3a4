//! The one handle through which an agent changes its node.

use std::net::IpAddr;

use ipnet::IpNet;

use crate::{
    Applied, ApplyError, Counts, Eni, Error, Found, Mac, NodePlan, PodPlan, PodPolicy, Removal,
    RemoveError,
};

/// The node's network. Cheap to clone; all clones are one.
#[derive(Clone, Debug)]
pub struct Datapath {}

impl Datapath {
    /// Lays the node's part, idempotently, and begins to own the rules. Living pods keep theirs.
    pub async fn open(plan: &NodePlan) -> Result<Self, Error> {
        let _ = plan;
        Err(Error::Closed)
    }

    /// Configures an ENI that was attached later. [`Error::NoSuchEni`]: not there yet, try again.
    /// Doing it twice is fine.
    pub async fn attach_eni(&self, eni: &Eni) -> Result<(), Error> {
        let _ = eni;
        Err(Error::Closed)
    }

    /// Forgets an ENI about to be detached; no pod may own an address of it any more.
    pub async fn detach_eni(&self, mac: Mac) -> Result<(), Error> {
        let _ = mac;
        Err(Error::Closed)
    }

    /// Gives a pod its network. On any error, what had been done is undone, in reverse.
    /// [`Error::Occupied`] as the cause: remove the older sandbox of the same pod, then call again.
    pub async fn apply(&self, plan: &PodPlan) -> Result<Applied, ApplyError> {
        let _ = plan;
        Err(ApplyError {
            cause: Error::Closed,
            undo: vec![],
        })
    }

    /// Takes over a pod that outlived the agent: its rules are made to be as planned, its link,
    /// routes and in-pod capture are left alone.
    pub async fn adopt(&self, plan: &PodPlan, applied: &Applied) -> Result<(), Error> {
        let _ = (plan, applied);
        Err(Error::Closed)
    }

    /// Changes a running pod's policy in one transaction.
    pub async fn update(&self, container_id: &str, policy: &PodPolicy) -> Result<(), Error> {
        let _ = (container_id, policy);
        Err(Error::Closed)
    }

    /// Takes a pod's network away; what is not there is fine. The link goes first, its denial last.
    /// Works without the pod's namespace.
    pub async fn remove(&self, removal: impl Into<Removal>) -> Result<(), RemoveError> {
        let _ = removal.into();
        Err(RemoveError(vec![Error::Closed]))
    }

    /// What differs between plan and reality, in words; empty: nothing.
    pub async fn check(&self, plan: &PodPlan, applied: &Applied) -> Result<Vec<String>, Error> {
        let _ = (plan, applied);
        Err(Error::Closed)
    }

    /// Every pod network that exists on the node.
    pub async fn list(&self) -> Result<Vec<Found>, Error> {
        Err(Error::Closed)
    }

    /// Says which addresses one source (`cluster/node`, `cluster/static`) holds to be the cluster;
    /// replaces what the same source said before. Pods applied here are members without it.
    pub async fn set_members(
        &self,
        source: &str,
        addresses: &[IpAddr],
        services: &[IpNet],
    ) -> Result<(), Error> {
        let _ = (source, addresses, services);
        Err(Error::Closed)
    }

    /// A source is gone, and its addresses are no longer the cluster unless another names them.
    pub async fn forget_members(&self, source: &str) -> Result<(), Error> {
        let _ = source;
        Err(Error::Closed)
    }

    /// After a restart: everything alive was adopted and every source was heard; what else the
    /// kernel still held from before goes.
    pub async fn settle(&self) -> Result<(), Error> {
        Err(Error::Closed)
    }

    /// Writes the whole ruleset again, as one transaction: after somebody flushed it.
    pub async fn repair(&self) -> Result<(), Error> {
        Err(Error::Closed)
    }

    pub async fn counts(&self) -> Result<Counts, Error> {
        Err(Error::Closed)
    }
}
