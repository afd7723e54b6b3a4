//! The node's nftables, with one writer.
//!
//! The writer keeps in memory what should stand ([`elements`]); each transaction carries the
//! difference ([`text`]), for all callers that wait. If the kernel's tables turn out to be missing,
//! the whole is written again. [`read`] learns at start what an earlier agent left.

pub(crate) mod elements;
pub(crate) mod read;
pub(crate) mod text;

use std::{
    collections::{BTreeSet, HashMap},
    net::IpAddr,
    sync::Arc,
};

use ipnet::IpNet;
use nix::net::if_::if_nametoindex;
use tracing::warn;
use turnpike_rules::pod::InboundPort;

use self::elements::{Element, Owner, PodRules, Shares};
pub(crate) use self::text::Base;
use crate::{
    Error, PodPolicy, Removal, nft,
    worker::{Job, Worker},
};

/// A wish for the ruleset.
#[derive(Debug)]
pub(crate) enum Edit {
    AttachEni {
        table: u32,
        interface: String,
    },
    DetachEni {
        table: u32,
        interface: String,
    },
    Pod {
        container_id: String,
        rules: PodRules,
    },
    Policy {
        container_id: String,
        policy: PodPolicy,
    },
    Remove(Removal),
    Members {
        source: String,
        addresses: Vec<IpAddr>,
        services: Vec<IpNet>,
    },
    Settle,
    Repair,
}

/// The way to the writer.
#[derive(Clone, Debug)]
pub(crate) struct Ruleset {
    writer: Worker<Edit>,
    pub(crate) began_bare: bool,
    /// What stood when this began.
    stood: Arc<BTreeSet<Element>>,
}

impl Ruleset {
    /// Lays the base over whatever stands, keeping the elements, and starts the writer.
    pub(crate) async fn open(base: Base) -> Result<Self, Error> {
        let writer = tokio::task::spawn_blocking(move || Writer::open(base));
        let writer = writer.await.map_err(|_| Error::Closed)??;
        let stood = Arc::new(writer.shares.elements().cloned().collect::<BTreeSet<_>>());
        let began_bare = stood.is_empty();
        Ok(Self {
            writer: Worker::start(writer, Writer::serve),
            began_bare,
            stood,
        })
    }

    /// How the pod at `address` was held when this began.
    pub(crate) fn stood(&self, address: IpAddr) -> PodPolicy {
        let inbound = self.stood.iter().filter_map(|element| match element {
            Element::Inbound {
                address: of,
                transport,
                port,
            } if *of == address => Some(InboundPort {
                transport: *transport,
                port: *port,
            }),
            _ => None,
        });
        PodPolicy {
            selected: self.stood.contains(&Element::Selected(address)),
            inbound: inbound.collect(),
        }
    }

    /// Returns when the kernel has it.
    pub(crate) async fn edit(&self, edit: Edit) -> Result<(), Error> {
        self.writer.ask(edit).await
    }

    /// Returns when rules can be changed no more.
    pub(crate) async fn ended(&self) {
        self.writer.ended().await;
    }
}

#[derive(Debug)]
struct Writer {
    base: Base,
    shares: Shares,
    pods: HashMap<String, PodRules>,
}

impl Writer {
    fn open(base: Base) -> Result<Self, Error> {
        let restored = read::elements()?;
        let mut writer = Self {
            base,
            shares: Shares::default(),
            pods: HashMap::new(),
        };
        // Pods found on an ENI that the plan does not name yet keep its mark.
        writer
            .base
            .tables
            .extend(restored.iter().filter_map(|element| match element {
                Element::Eni { table, .. } => Some(*table),
                _ => None,
            }));
        writer.shares.replace(Owner::Restored, restored);
        writer.shares.commit();
        if let Err(reason) = nft::transact("the node's rules", &writer.base.render()) {
            // Tables of another version's shape: all at once, which costs the counts.
            warn!(%reason, "the node's tables cannot be changed in place and are made anew");
            nft::transact("the node's rules, made anew", &writer.whole(true))?;
        }
        Ok(writer)
    }

    /// One transaction for all; if it fails, one for each, so that nobody fails for another's sake.
    fn serve(&mut self, jobs: Vec<Job<Edit>>) {
        let (edits, waiting): (Vec<_>, Vec<_>) =
            jobs.into_iter().map(|job| (job.wish, job.done)).unzip();
        if edits.len() > 1 && self.attempt(&edits).is_ok() {
            waiting.into_iter().for_each(|done| drop(done.send(Ok(()))));
            return;
        }
        for (edit, done) in edits.iter().zip(waiting) {
            let _ = done.send(self.attempt(std::slice::from_ref(edit)));
        }
    }

    fn attempt(&mut self, edits: &[Edit]) -> Result<(), Error> {
        let (base, pods) = (self.base.clone(), self.touched_pods(edits));
        let outcome = self
            .stage(edits)
            .and_then(|whole| self.write(whole, self.base != base));
        match outcome {
            Ok(()) => self.shares.commit(),
            Err(_) => {
                self.shares.roll_back();
                self.base = base;
                for (container_id, before) in pods {
                    match before {
                        Some(rules) => self.pods.insert(container_id, rules),
                        None => self.pods.remove(&container_id),
                    };
                }
            }
        }
        outcome
    }

    fn touched_pods(&self, edits: &[Edit]) -> Vec<(String, Option<PodRules>)> {
        let touched = edits.iter().filter_map(|edit| match edit {
            Edit::Pod { container_id, .. } | Edit::Policy { container_id, .. } => {
                Some(container_id)
            }
            Edit::Remove(removal) => Some(&removal.container_id),
            _ => None,
        });
        touched
            .map(|id| (id.clone(), self.pods.get(id).cloned()))
            .collect()
    }

    /// Changes what should stand. True: all of it has to be written.
    fn stage(&mut self, edits: &[Edit]) -> Result<bool, Error> {
        let mut whole = false;
        for edit in edits {
            match edit {
                Edit::AttachEni { table, interface } => {
                    self.base.tables.insert(*table);
                    self.base.interfaces.insert(interface.clone());
                }
                Edit::DetachEni { table, interface } => {
                    self.base.tables.remove(table);
                    self.base.interfaces.remove(interface);
                }
                Edit::Pod {
                    container_id,
                    rules,
                } => {
                    self.set_pod(container_id, rules.clone())?;
                }
                Edit::Policy {
                    container_id,
                    policy,
                } => {
                    let known = self.pods.get(container_id);
                    let container = || Error::Unknown {
                        container_id: container_id.clone(),
                    };
                    let mut rules = known.ok_or_else(container)?.clone();
                    rules.policy = policy.clone();
                    self.set_pod(container_id, rules)?;
                }
                Edit::Remove(removal) => self.remove(removal),
                Edit::Members {
                    source,
                    addresses,
                    services,
                } => {
                    let elements = addresses.iter().copied().map(Element::Cluster);
                    let services = services.iter().map(|range| Element::Service(range.trunc()));
                    let owner = Owner::Members(source.clone());
                    self.shares
                        .replace(owner, elements.chain(services).collect());
                }
                Edit::Settle => self.settle(),
                Edit::Repair => whole = true,
            }
        }
        Ok(whole)
    }

    fn set_pod(&mut self, container_id: &str, rules: PodRules) -> Result<(), Error> {
        if let Some(table) = rules
            .table
            .filter(|table| !self.base.tables.contains(table))
        {
            return Err(Error::Invalid {
                what: format!("no ENI with table {table} is attached, so no pod can have it"),
            });
        }
        self.claim_restored(&rules.interface, &rules.addresses);
        self.shares
            .replace(Owner::Pod(container_id.to_owned()), rules.elements());
        self.pods.insert(container_id.to_owned(), rules);
        Ok(())
    }

    fn remove(&mut self, removal: &Removal) {
        self.claim_restored(&removal.host_interface, &removal.addresses);
        self.shares
            .replace(Owner::Pod(removal.container_id.clone()), BTreeSet::new());
        self.pods.remove(&removal.container_id);
    }

    /// What nobody claimed goes, except for a pod whose link still stands: that nobody took it over
    /// is no reason to hold it to less than before.
    fn settle(&mut self) {
        let Some(restored) = self.shares.get(&Owner::Restored) else {
            return;
        };
        let stands = |interface: &str| if_nametoindex(interface).is_ok();
        let mut interfaces = BTreeSet::new();
        let mut addresses = Vec::new();
        for element in restored {
            match element {
                Element::Ingress(interface) if stands(interface) => {
                    interfaces.insert(interface.clone());
                }
                Element::Speaks {
                    interface, address, ..
                } if stands(interface) => addresses.push(*address),
                _ => {}
            }
        }
        let kept = |element: &&Element| {
            element.concerns("", &addresses)
                || interfaces
                    .iter()
                    .any(|interface| element.concerns(interface, &[]))
        };
        let rest = restored.iter().filter(kept).cloned().collect();
        self.shares.replace(Owner::Restored, rest);
    }

    /// What was left from before is no longer nobody's.
    fn claim_restored(&mut self, interface: &str, addresses: &[IpAddr]) {
        let Some(restored) = self.shares.get(&Owner::Restored) else {
            return;
        };
        let rest: BTreeSet<_> = restored
            .iter()
            .filter(|e| !e.concerns(interface, addresses))
            .cloned()
            .collect();
        if rest.len() != restored.len() {
            self.shares.replace(Owner::Restored, rest);
        }
    }

    fn write(&self, whole: bool, base_changed: bool) -> Result<(), Error> {
        if whole {
            return nft::transact("the whole ruleset", &self.whole(false));
        }
        let delta = self.shares.delta();
        let services = delta
            .changes_services()
            .then(|| text::services(self.shares.elements()));
        let mut script = text::render_delta(&delta, services.as_deref());
        if base_changed {
            script = self.base.render() + &script;
        }
        if script.is_empty() {
            return Ok(());
        }
        match nft::transact("a change of pods or members", &script) {
            Err(Error::Nft { message, .. }) if message.contains("No such file or directory") => {
                warn!(%message, "rules are missing, somebody took them: all are written again");
                nft::transact("the whole ruleset", &self.whole(false))
            }
            other => other,
        }
    }

    fn whole(&self, afresh: bool) -> String {
        let exists = |interface: &str| if_nametoindex(interface).is_ok();
        text::render_whole(&self.base, &self.shares.standing(), afresh, exists)
    }
}
