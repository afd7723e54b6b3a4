//! The pool held against EC2 and the kernel.
//!
//! EC2 says what is assigned, but its answers lag: a new address may be missing and a given-back
//! one still listed. So one look only stops an address from being given out; the second look in a
//! row changes the pool. The kernel does not lag: what a veth uses is in use, whatever else is
//! said, and is never taken away.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::Ipv4Addr,
};

use crate::{
    Action, Attachment, Eni, EniId, Holder, Lease, Moment, Pool, Record,
    pool::{Slot, count},
};

/// Looks in a row that must agree before the pool follows EC2 or gives up a lease.
const LOOKS: u32 = 2;

/// One look at EC2.
#[derive(Clone, Debug)]
pub struct View {
    /// Taken before the first call of the look: what changed after it may not be in it.
    pub asked_at: Moment,
    pub enis: Vec<EniView>,
}

#[derive(Clone, Debug)]
pub struct EniView {
    /// None for an interface made for this node that hangs on nothing.
    pub attached: Option<Eni>,
    pub id: EniId,
    /// Secondary addresses.
    pub addresses: Vec<Ipv4Addr>,
    /// Token of the intent that made it, if one of ours did.
    pub token: Option<String>,
    /// False: somebody asked us to keep our hands off it.
    pub managed: bool,
}

/// An address that a pod's veth uses, as the kernel has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Live {
    pub address: Ipv4Addr,
    pub holder: Holder,
}

/// What somebody should know, or do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Finding {
    /// A pod's address that EC2 does not hold for this node: its packets are dropped out there.
    LiveNotAssigned { address: Ipv4Addr },
    /// A lease whose veth is gone: its address cools.
    LeaseWithoutLink {
        attachment: Attachment,
        address: Ipv4Addr,
    },
    /// A veth nobody had leased an address to: it has a lease now.
    Adopted {
        attachment: Attachment,
        address: Ipv4Addr,
    },
    /// Two claim one address. The kernel's side keeps it.
    Conflict {
        address: Ipv4Addr,
        holder: Attachment,
        live: Attachment,
    },
    /// EC2 listed an address on our interface that we did not ask for.
    Unknown { eni: EniId, address: Ipv4Addr },
    /// An interface with pods on it that EC2 does not list.
    EniMissing { eni: EniId },
}

/// What a reconcile found, beyond the records that it applied.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Outcome {
    pub findings: Vec<Finding>,
    /// Attached and to stay, but not [`ready`](Pool::ready): they need a link, a table and rules.
    /// New ones, and ones whose deletion did not come about.
    pub unready: Vec<Eni>,
}

impl Pool {
    /// Holds the pool against the kernel before anything else runs: no ADD is under way, so a
    /// lease without a veth is one that was never acknowledged, or a reboot took the pod.
    pub fn restore(&mut self, live: &[Live], now: Moment, log: &mut Vec<Record>) -> Outcome {
        let mut outcome = Outcome::default();
        self.watch.pending.clear();
        self.follow_kernel(live, 1, now, log, &mut outcome);
        outcome
    }

    /// Holds the pool against EC2 and the kernel while it works. `live` must have been listed
    /// after `view` was asked for.
    pub fn reconcile(
        &mut self,
        view: &View,
        live: &[Live],
        now: Moment,
        log: &mut Vec<Record>,
    ) -> Outcome {
        let mut outcome = Outcome::default();
        // A pool that knows nothing has no history that a lagging answer could repeat.
        let first = self.enis.is_empty();
        self.watch.unmanaged = count(
            view.enis
                .iter()
                .filter(|eni| !eni.managed && eni.attached.is_some()),
        );
        self.follow_unattached(view);
        let listed: BTreeMap<&EniId, &EniView> = view
            .enis
            .iter()
            .filter(|eni| eni.managed && eni.attached.is_some())
            .map(|eni| (&eni.id, eni))
            .collect();
        for eni in listed.values() {
            self.follow_eni(eni, first, view.asked_at, now, log, &mut outcome);
        }
        self.missing_enis(&listed, view.asked_at, log, &mut outcome);
        self.resolve(view, &listed, now, log);
        self.follow_kernel(live, LOOKS, now, log, &mut outcome);
        let unready = self
            .enis
            .values()
            .filter(|it| !it.ready && !it.leaving && it.misses == 0)
            .filter(|it| listed.contains_key(&it.eni.id));
        outcome.unready = unready.map(|it| it.eni.clone()).collect();
        outcome
    }

    fn follow_unattached(&mut self, view: &View) {
        let loose = view
            .enis
            .iter()
            .filter(|eni| eni.managed && eni.attached.is_none());
        let ids: BTreeSet<_> = loose
            .filter(|eni| !self.intends(eni.token.as_deref()))
            .map(|eni| eni.id.clone())
            .collect();
        self.watch.unattached.retain(|eni, _| ids.contains(eni));
        for id in ids {
            self.watch.unattached.entry(id).or_insert(view.asked_at);
        }
    }

    fn intends(&self, token: Option<&str>) -> bool {
        token.is_some_and(|token| self.intents.values().any(|open| open.intent.token == token))
    }

    fn follow_eni(
        &mut self,
        listed: &EniView,
        first: bool,
        asked_at: Moment,
        now: Moment,
        log: &mut Vec<Record>,
        outcome: &mut Outcome,
    ) {
        let Some(eni) = &listed.attached else { return };
        if !self.enis.contains_key(&listed.id) {
            // One that is being made becomes known when its maker is done with it.
            if self.intends(listed.token.as_deref()) {
                return;
            }
            self.commit(
                Record::Eni {
                    eni: eni.clone(),
                    at: now,
                },
                log,
            );
        }
        self.unlisted(listed, asked_at, log);
        self.strange(listed, first, now, log, outcome);
    }

    /// Ours, but not listed: not given out now, and after the second look not ours any more. A
    /// leased one stays: a pod uses it.
    fn unlisted(&mut self, listed: &EniView, asked_at: Moment, log: &mut Vec<Record>) {
        let Some(interface) = self.enis.get_mut(&listed.id) else {
            return;
        };
        interface.misses = 0;
        let mut lost = Vec::new();
        for (address, state) in &mut interface.addresses {
            if listed.addresses.contains(address) {
                state.misses = 0;
                continue;
            }
            let since_asked = matches!(state.slot, Slot::Free { from } if from > asked_at);
            if since_asked || state.slot == Slot::Leaving {
                continue;
            }
            state.misses += 1;
            if state.misses >= LOOKS && state.slot != Slot::Leased {
                lost.push(*address);
            }
        }
        if !lost.is_empty() {
            self.commit(
                Record::Lost {
                    eni: listed.id.clone(),
                    addresses: lost,
                },
                log,
            );
        }
    }

    /// Listed, but not known as ours.
    fn strange(
        &mut self,
        listed: &EniView,
        first: bool,
        now: Moment,
        log: &mut Vec<Record>,
        outcome: &mut Outcome,
    ) {
        let until = now + self.config.cooldown;
        let Some(interface) = self.enis.get_mut(&listed.id) else {
            return;
        };
        let (mut unknown, mut cleared) = (Vec::new(), Vec::new());
        for address in listed
            .addresses
            .iter()
            .filter(|it| **it != interface.eni.primary)
        {
            match interface.addresses.get_mut(address) {
                None if first => cleared.push(*address),
                None => unknown.push(*address),
                Some(state) => {
                    if let Slot::Quarantined { until } = state.slot {
                        state.sightings += 1;
                        if state.sightings >= LOOKS && until <= now {
                            cleared.push(*address);
                        }
                    }
                }
            }
        }
        let eni = listed.id.clone();
        for address in &unknown {
            outcome.findings.push(Finding::Unknown {
                eni: eni.clone(),
                address: *address,
            });
        }
        if !unknown.is_empty() {
            let record = Record::Quarantined {
                eni: eni.clone(),
                addresses: unknown,
                until,
            };
            self.commit(record, log);
        }
        if !cleared.is_empty() {
            self.commit(
                Record::Gained {
                    eni,
                    addresses: cleared,
                    at: now,
                },
                log,
            );
        }
    }

    fn missing_enis(
        &mut self,
        listed: &BTreeMap<&EniId, &EniView>,
        asked_at: Moment,
        log: &mut Vec<Record>,
        outcome: &mut Outcome,
    ) {
        let mut gone = Vec::new();
        for (id, interface) in &mut self.enis {
            if listed.contains_key(id) || interface.since > asked_at || interface.leaving {
                continue;
            }
            interface.misses += 1;
            if interface.misses < LOOKS {
                continue;
            }
            if interface.eni.is_primary() || self.leases.values().any(|lease| lease.eni == *id) {
                outcome
                    .findings
                    .push(Finding::EniMissing { eni: id.clone() });
            } else {
                gone.push(id.clone());
            }
        }
        for eni in gone {
            self.commit(Record::EniGone { eni }, log);
        }
    }

    /// Ends the intents whose answer never came and that this look is young enough to tell about.
    fn resolve(
        &mut self,
        view: &View,
        listed: &BTreeMap<&EniId, &EniView>,
        now: Moment,
        log: &mut Vec<Record>,
    ) {
        let open: Vec<_> = self
            .intents
            .values()
            .filter(|open| open.unknown && open.intent.at < view.asked_at)
            .map(|open| open.intent.clone())
            .collect();
        for intent in open {
            match &intent.action {
                // Resumed by whoever makes the calls: the token makes that safe.
                Action::Create { .. } => continue,
                Action::Assign { .. } | Action::Reclaim { .. } => {}
                Action::Unassign { eni, addresses } => {
                    self.resolve_unassign(eni, addresses, listed.get(eni).copied(), now, log);
                }
                Action::Delete { eni } if !listed.contains_key(eni) => {
                    self.commit(Record::EniGone { eni: eni.clone() }, log);
                }
                // Still there, or an old answer: the next look says which.
                Action::Delete { eni } => {
                    if let Some(interface) = self.enis.get_mut(eni) {
                        interface.misses = 1;
                    }
                }
            }
            self.commit(Record::Settled { id: intent.id }, log);
        }
    }

    /// Still listed may be the lag's doing, so it is quarantined, not free.
    fn resolve_unassign(
        &mut self,
        eni: &EniId,
        addresses: &[Ipv4Addr],
        listed: Option<&EniView>,
        now: Moment,
        log: &mut Vec<Record>,
    ) {
        let Some(interface) = self.enis.get(eni) else {
            return;
        };
        let leaving = |address: &&Ipv4Addr| {
            interface
                .addresses
                .get(*address)
                .is_some_and(|state| state.slot == Slot::Leaving)
        };
        let is_listed =
            |address: &Ipv4Addr| listed.is_some_and(|listed| listed.addresses.contains(address));
        let (kept, lost): (Vec<_>, Vec<_>) = addresses
            .iter()
            .filter(leaving)
            .copied()
            .partition(is_listed);
        self.commit(
            Record::Lost {
                eni: eni.clone(),
                addresses: lost,
            },
            log,
        );
        if !kept.is_empty() {
            let until = now + self.config.cooldown;
            self.commit(
                Record::Quarantined {
                    eni: eni.clone(),
                    addresses: kept,
                    until,
                },
                log,
            );
        }
    }

    fn follow_kernel(
        &mut self,
        live: &[Live],
        looks: u32,
        now: Moment,
        log: &mut Vec<Record>,
        outcome: &mut Outcome,
    ) {
        self.ghosts(live, looks, now, log, outcome);
        let mut strays = BTreeSet::new();
        for veth in live {
            if !self.adopt(veth, now, log, outcome) {
                strays.insert(veth.address);
            }
        }
        for interface in self.enis.values() {
            let lost = interface
                .addresses
                .iter()
                .filter(|(_, state)| state.slot == Slot::Leased && state.misses >= LOOKS);
            strays.extend(lost.map(|(address, _)| *address));
        }
        let findings = strays
            .iter()
            .map(|address| Finding::LiveNotAssigned { address: *address });
        outcome.findings.extend(findings);
        self.watch.strays = strays;
    }

    /// Leases whose veth is gone.
    fn ghosts(
        &mut self,
        live: &[Live],
        looks: u32,
        now: Moment,
        log: &mut Vec<Record>,
        outcome: &mut Outcome,
    ) {
        let linked: BTreeSet<_> = live.iter().map(|veth| &veth.holder.attachment).collect();
        let candidates: Vec<_> = self
            .leases
            .keys()
            .filter(|it| !linked.contains(it) && !self.watch.pending.contains(*it))
            .cloned()
            .collect();
        self.watch
            .lease_misses
            .retain(|attachment, _| candidates.contains(attachment));
        for attachment in candidates {
            let misses = self
                .watch
                .lease_misses
                .entry(attachment.clone())
                .or_default();
            *misses += 1;
            if *misses < looks {
                continue;
            }
            if let Some(lease) = self.release(&attachment, now, log) {
                let address = lease.address;
                outcome.findings.push(Finding::LeaseWithoutLink {
                    attachment,
                    address,
                });
            }
        }
    }

    /// True if the veth has, or now gets, the lease of its address.
    fn adopt(
        &mut self,
        veth: &Live,
        now: Moment,
        log: &mut Vec<Record>,
        outcome: &mut Outcome,
    ) -> bool {
        let attachment = &veth.holder.attachment;
        let address = veth.address;
        if let Some(holder) = self.holders.get(&address) {
            if holder == attachment {
                return true;
            }
            let (holder, live) = (holder.clone(), attachment.clone());
            let pending = self.watch.pending.contains(&holder);
            outcome.findings.push(Finding::Conflict {
                address,
                holder,
                live,
            });
            if pending {
                return true;
            }
        }
        let home = self
            .enis
            .values()
            .find(|eni| eni.addresses.contains_key(&address));
        let Some(eni) = home.map(|interface| interface.eni.id.clone()) else {
            return false;
        };
        let lease = Lease {
            holder: veth.holder.clone(),
            address,
            eni,
            at: now,
            note: None,
        };
        self.commit(Record::Leased { lease }, log);
        let attachment = attachment.clone();
        outcome.findings.push(Finding::Adopted {
            attachment,
            address,
        });
        true
    }
}
