//! The one handle through which an agent changes its node.

use std::{
    collections::HashMap,
    net::IpAddr,
    sync::{Arc, Mutex, PoisonError},
};

use ipnet::IpNet;
use tokio::sync::oneshot;

use crate::{
    Applied, ApplyError, Counts, Eni, Error, Found, Mac, NodePlan, PodPlan, PodPolicy, Refusals,
    Removal, RemoveError, counts,
    host::Host,
    links::{self, Link, Neighbour, Route},
    marks, node, pod,
    ruleset::{Edit, Ruleset},
    sysctl::Sysctls,
};

/// The node's network. Cheap to clone; all clones are one.
///
/// What a call began it ends, even if the caller stops waiting: a request that ran into its deadline
/// leaves no half-built pod.
#[derive(Clone, Debug)]
pub struct Datapath {
    host: Host,
    ruleset: Ruleset,
    /// Secondary ENIs: table and interface.
    enis: Arc<Mutex<HashMap<Mac, (u32, String)>>>,
}

impl Datapath {
    /// Lays the node's part, idempotently, and begins to own the rules. Living pods keep theirs.
    ///
    /// Must be called on a tokio runtime whose threads are in the node's network namespace.
    pub async fn open(plan: &NodePlan) -> Result<Self, Error> {
        let host = Host::open(Sysctls::at(&plan.sysctls)).await?;
        let (wanted, sysctls) = (plan.clone(), host.sysctls.clone());
        let laid = host
            .run(move |rtnl| node::lay(rtnl, &sysctls, &wanted))
            .await?;
        let mut enis = HashMap::new();
        for eni in &plan.secondary {
            let interface = laid.interfaces.get(&eni.table).cloned().unwrap_or_default();
            enis.insert(eni.mac, (eni.table, interface));
        }
        let ruleset = Ruleset::open(node::base(plan, laid)).await?;
        let sysctls = host.sysctls.clone();
        host.run(move |_| node::open_forwarding(&sysctls)).await?;
        Ok(Self {
            host,
            ruleset,
            enis: Arc::new(Mutex::new(enis)),
        })
    }

    /// Configures an ENI that was attached later. [`Error::NoSuchEni`]: not there yet, try again.
    /// Doing it twice is fine.
    pub async fn attach_eni(&self, eni: &Eni) -> Result<(), Error> {
        let (wanted, sysctls) = (eni.clone(), self.host.sysctls.clone());
        let interface = self
            .host
            .run(move |rtnl| node::attach_eni(rtnl, &sysctls, &wanted))
            .await?;
        let known = (eni.table, interface.clone());
        self.enis
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .insert(eni.mac, known);
        self.ruleset
            .edit(Edit::AttachEni {
                table: eni.table,
                interface,
            })
            .await
    }

    /// Forgets an ENI about to be detached; no pod may own an address of it any more.
    pub async fn detach_eni(&self, mac: Mac) -> Result<(), Error> {
        let known = self
            .enis
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .remove(&mac);
        let Some((table, interface)) = known else {
            return Ok(());
        };
        self.ruleset
            .edit(Edit::DetachEni { table, interface })
            .await?;
        self.host
            .run(move |rtnl| node::detach_eni(rtnl, table))
            .await
    }

    /// Gives a pod its network. On any error, what had been done is undone, in reverse.
    /// [`Error::Occupied`] as the cause: remove the older sandbox of the same pod, then call again.
    ///
    /// A caller that stops waiting gets nothing: the network is taken away when it is finished.
    pub async fn apply(&self, plan: &PodPlan) -> Result<Applied, ApplyError> {
        let (this, plan) = (self.clone(), plan.clone());
        let (sender, receiver) = oneshot::channel();
        tokio::spawn(async move {
            let outcome = pod::apply(&this.host, &this.ruleset, &plan).await;
            if let Err(Ok(applied)) = sender.send(outcome) {
                tracing::warn!(
                    container = applied.container_id,
                    "ADD was given up, undoing it"
                );
                if let Err(error) = this.remove(&applied).await {
                    tracing::error!(container = applied.container_id, %error, "undoing an ADD");
                }
            }
        });
        let closed = |_| {
            Err(ApplyError {
                cause: Error::Closed,
                undo: Vec::new(),
            })
        };
        receiver.await.unwrap_or_else(closed)
    }

    /// Takes over a pod that outlived the agent: its rules are made to be as planned, its link,
    /// routes and in-pod capture are left alone.
    pub async fn adopt(&self, plan: &PodPlan, applied: &Applied) -> Result<(), Error> {
        plan.validate()?;
        let rules = pod::rules(plan, applied);
        let container_id = plan.container_id.clone();
        self.ruleset
            .edit(Edit::Pod {
                container_id,
                rules,
            })
            .await
    }

    /// How the pod at `address` was held when this was opened, by whoever ran before.
    pub fn stood(&self, address: IpAddr) -> PodPolicy {
        self.ruleset.stood(address)
    }

    /// Changes a running pod's policy in one transaction. [`Error::Unknown`]: neither applied nor
    /// adopted by this process.
    pub async fn update(&self, container_id: &str, policy: &PodPolicy) -> Result<(), Error> {
        let (container_id, policy) = (container_id.to_owned(), policy.clone());
        self.ruleset
            .edit(Edit::Policy {
                container_id,
                policy,
            })
            .await
    }

    /// Takes a pod's network away; what is not there is fine. The link goes first, its denial last.
    /// Works without the pod's namespace.
    pub async fn remove(&self, removal: impl Into<Removal>) -> Result<(), RemoveError> {
        let (this, removal) = (self.clone(), removal.into());
        let task =
            tokio::spawn(async move { pod::remove(&this.host, &this.ruleset, removal).await });
        task.await
            .unwrap_or_else(|_| Err(RemoveError(vec![Error::Closed])))
    }

    /// What differs between plan and reality, in words; empty: nothing.
    pub async fn check(&self, plan: &PodPlan, applied: &Applied) -> Result<Vec<String>, Error> {
        pod::check(&self.host, plan, applied).await
    }

    /// Every pod network that exists on the node.
    pub async fn list(&self) -> Result<Vec<Found>, Error> {
        self.host
            .run(|rtnl| {
                let mut routes = Vec::new();
                for v6 in [false, true] {
                    let found = Route::all(rtnl, v6, marks::PODS_TABLE);
                    routes.extend(found.map_err(Error::kernel("listing the routes to pods"))?);
                }
                let neighbours = links::permanent_neighbours(rtnl)
                    .map_err(Error::kernel("listing the pods' neighbours"))?;
                let links = Link::all(rtnl)?.into_iter().filter(is_pods);
                let found = links.filter_map(|link| found(link, &routes, &neighbours));
                Ok(found.collect())
            })
            .await
    }

    /// Says which addresses one source (`cluster/node`, `cluster/static`) holds to be the cluster;
    /// replaces what the same source said before. Pods applied here are members without it.
    pub async fn set_members(
        &self,
        source: &str,
        addresses: &[IpAddr],
        services: &[IpNet],
    ) -> Result<(), Error> {
        let source = source.to_owned();
        let (addresses, services) = (addresses.to_vec(), services.to_vec());
        self.ruleset
            .edit(Edit::Members {
                source,
                addresses,
                services,
            })
            .await
    }

    /// A source is gone, and its addresses are no longer the cluster unless another names them.
    pub async fn forget_members(&self, source: &str) -> Result<(), Error> {
        self.set_members(source, &[], &[]).await
    }

    /// After a restart: everything alive was adopted and every source was heard; what else the
    /// kernel still held from before goes. A pod whose link stands is held to its rules even if
    /// nobody adopted it.
    pub async fn settle(&self) -> Result<(), Error> {
        self.ruleset.edit(Edit::Settle).await
    }

    /// Writes the whole ruleset again, as one transaction: after somebody flushed it.
    pub async fn repair(&self) -> Result<(), Error> {
        self.ruleset.edit(Edit::Repair).await
    }

    /// Reads all counters: for a scrape, not for a request, since nft lists the cluster's members on the
    /// way (20 ms of CPU with few of them, 70 ms with ten thousand).
    pub async fn counts(&self) -> Result<Counts, Error> {
        tokio::task::spawn_blocking(counts::read)
            .await
            .map_err(|_| Error::Closed)?
    }

    /// How much the rules refused, and how much of it they did not log. Cheaper than
    /// [`counts`](Self::counts): no set is listed.
    pub async fn refusals(&self) -> Result<Refusals, Error> {
        tokio::task::spawn_blocking(counts::refusals)
            .await
            .map_err(|_| Error::Closed)?
    }

    /// Returns when this can change the kernel no more: a part of it broke. What stands stays, and
    /// a new process takes it over.
    pub async fn ended(&self) {
        tokio::select! {
            () = self.host.ended() => {}
            () = self.ruleset.ended() => {}
        }
    }

    /// Whether there were no rules at all when this was opened.
    pub fn began_bare(&self) -> bool {
        self.ruleset.began_bare
    }
}

/// By its note, or by its name where an ADD did not come to the note.
fn is_pods(link: &Link) -> bool {
    let hash = link.name.strip_prefix("eni").unwrap_or_default();
    let named = hash.len() == 11 && hash.chars().all(|c| c.is_ascii_hexdigit());
    link.veth && (named || link.alias.as_deref().and_then(pod::container_in).is_some())
}

fn found(link: Link, routes: &[Route], neighbours: &[Neighbour]) -> Option<Found> {
    let mine = routes.iter().filter(|route| route.index == link.index);
    let addresses: Vec<_> = mine.filter_map(|route| route.to).collect();
    let pod = neighbours
        .iter()
        .find(|neighbour| neighbour.index == link.index && addresses.contains(&neighbour.address));
    Some(Found {
        container_id: link
            .alias
            .as_deref()
            .and_then(pod::container_in)
            .map(str::to_owned),
        host_mac: link.mac?,
        pod_mac: pod.map(|neighbour| neighbour.mac),
        mtu: link.mtu,
        up: link.up,
        addresses,
        host_interface: link.name,
    })
}
