//! The pool: who holds what, as the fold of records.
//!
//! Every change is a [`Record`] first and then [`Pool::apply`], in memory exactly as after a
//! restart. Methods that change something append the records they applied to `log`; they are in
//! effect at once, and durable when the caller has committed them.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    net::Ipv4Addr,
    time::Duration,
};

use crate::{
    Action, Attachment, Config, Counts, Eni, EniId, Holder, Intent, IntentId, Lease, Moment,
    PodRef, Record,
};

/// At most one step down in this time, and none right after a start, so that a pod or an agent that
/// restarts costs no calls.
pub(crate) const SHRINK_PAUSE: Duration = Duration::from_secs(30);

/// No address is allocatable now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Full {
    /// When the first one has cooled down; none if only EC2 can help.
    pub cooled_at: Option<Moment>,
}

#[derive(Debug)]
pub struct Pool {
    pub(crate) config: Config,
    pub(crate) enis: BTreeMap<EniId, Interface>,
    pub(crate) leases: BTreeMap<Attachment, Lease>,
    pub(crate) holders: HashMap<Ipv4Addr, Attachment>,
    pub(crate) intents: BTreeMap<IntentId, Open>,
    pub(crate) next_intent: u64,
    pub(crate) boot: Option<String>,
    /// The latest time on record in this boot: what is free only later was cooling then.
    pub(crate) seen: Moment,
    pub(crate) watch: Watch,
    pub(crate) pace: Pace,
}

/// What is observed or asked but not on record: a restart begins it anew, on the safe side.
#[derive(Debug, Default)]
pub(crate) struct Watch {
    /// ADDs that are not finished: their kernel side may not be there yet.
    pub(crate) pending: BTreeSet<Attachment>,
    /// Leases whose veth was not there at the last look.
    pub(crate) lease_misses: BTreeMap<Attachment, u32>,
    /// Addresses that a veth uses and EC2 does not hold for us.
    pub(crate) strays: BTreeSet<Ipv4Addr>,
    /// Interfaces of this node that hang on nothing, and since when.
    pub(crate) unattached: BTreeMap<EniId, Moment>,
    /// Attached, but not ours to manage: they count against the instance's limit.
    pub(crate) unmanaged: u32,
    /// Pods bound to the node that hold no address yet.
    pub(crate) expected: u32,
}

/// When EC2 may be asked again.
#[derive(Debug, Default)]
pub(crate) struct Pace {
    pub(crate) grow_after: Moment,
    pub(crate) shrink_after: Moment,
}

#[derive(Clone, Debug)]
pub(crate) struct Interface {
    pub(crate) eni: Eni,
    pub(crate) since: Moment,
    pub(crate) addresses: BTreeMap<Ipv4Addr, Address>,
    /// Its link and routes stand: its addresses may be given out.
    pub(crate) ready: bool,
    /// On its way back to EC2.
    pub(crate) leaving: bool,
    /// Times in a row that EC2 did not list it.
    pub(crate) misses: u32,
}

#[derive(Clone, Debug)]
pub(crate) struct Address {
    pub(crate) slot: Slot,
    /// Times in a row that EC2 did not list it; not given out meanwhile.
    pub(crate) misses: u32,
    /// Times that EC2 listed it while it is quarantined.
    pub(crate) sightings: u32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Slot {
    /// For the next pod from this moment on; until then it cools.
    Free {
        from: Moment,
    },
    Leased,
    Quarantined {
        until: Moment,
    },
    Leaving,
}

#[derive(Clone, Debug)]
pub(crate) struct Open {
    pub(crate) intent: Intent,
    /// Nobody waits for the call any more: what came of it is EC2's to tell.
    pub(crate) unknown: bool,
}

impl Address {
    pub(crate) fn new(slot: Slot) -> Self {
        Self {
            slot,
            misses: 0,
            sightings: 0,
        }
    }

    /// Since when it can be given out, if it can.
    pub(crate) fn free_since(&self, now: Moment) -> Option<Moment> {
        match self.slot {
            _ if self.misses > 0 => None,
            Slot::Free { from } if from <= now => Some(from),
            Slot::Free { .. } | Slot::Leased | Slot::Quarantined { .. } | Slot::Leaving => None,
        }
    }
}

impl Open {
    /// Addresses that the interface begins with which it makes, if it makes one.
    pub(crate) fn creating(&self) -> Option<u32> {
        match self.intent.action {
            Action::Create { addresses } => Some(addresses),
            _ => None,
        }
    }
}

impl Interface {
    /// Pods may get its addresses.
    pub(crate) fn usable(&self) -> bool {
        self.ready && !self.leaving && self.misses == 0
    }

    pub(crate) fn free(&self, now: Moment) -> u32 {
        count(
            self.addresses
                .values()
                .filter(|address| address.free_since(now).is_some()),
        )
    }

    pub(crate) fn leased(&self) -> u32 {
        count(
            self.addresses
                .values()
                .filter(|address| address.slot == Slot::Leased),
        )
    }
}

pub(crate) fn count(items: impl Iterator) -> u32 {
    u32::try_from(items.count()).unwrap_or(u32::MAX)
}

impl Pool {
    pub fn new(config: Config) -> Self {
        Self {
            config,
            enis: BTreeMap::new(),
            leases: BTreeMap::new(),
            holders: HashMap::new(),
            intents: BTreeMap::new(),
            next_intent: 0,
            boot: None,
            seen: Moment(0),
            watch: Watch::default(),
            pace: Pace::default(),
        }
    }

    pub fn config(&self) -> Config {
        self.config
    }

    pub fn lease_of(&self, attachment: &Attachment) -> Option<&Lease> {
        self.leases.get(attachment)
    }

    pub fn leases(&self) -> impl Iterator<Item = &Lease> {
        self.leases.values()
    }

    pub fn enis(&self) -> impl Iterator<Item = &Eni> {
        self.enis.values().map(|interface| &interface.eni)
    }

    pub fn addresses(&self, eni: &EniId) -> impl Iterator<Item = Ipv4Addr> {
        self.enis
            .get(eni)
            .into_iter()
            .flat_map(|interface| interface.addresses.keys().copied())
    }

    /// How many of the interface's addresses pods hold.
    pub fn leased_on(&self, eni: &EniId) -> u32 {
        self.enis.get(eni).map_or(0, Interface::leased)
    }

    /// The interface's link, table and rules stand; from now on its addresses are given out.
    pub fn ready(&mut self, eni: &EniId) {
        if let Some(interface) = self.enis.get_mut(eni) {
            interface.ready = true;
        }
    }

    /// How many pods are bound to the node and hold no address yet: planned for ahead of their ADD.
    pub fn expect(&mut self, pods: u32) {
        self.watch.expected = pods;
    }

    /// Starts a process on this machine's boot `id`. Times of another boot say nothing now, so
    /// what cooled then cools from now.
    pub fn boot(&mut self, id: &str, now: Moment, log: &mut Vec<Record>) {
        self.pace.shrink_after = now + SHRINK_PAUSE;
        if self.boot.as_deref() != Some(id) {
            self.commit(
                Record::Boot {
                    id: id.to_owned(),
                    at: now,
                },
                log,
            );
        }
    }

    /// Gives the attachment an address: the one it has, or one of the interface that has the most
    /// pods already, so that the others empty and can go back. Among its addresses, the one that
    /// has rested longest.
    pub fn lease(
        &mut self,
        holder: Holder,
        now: Moment,
        log: &mut Vec<Record>,
    ) -> Result<Lease, Full> {
        if let Some(lease) = self.leases.get(&holder.attachment) {
            return Ok(lease.clone());
        }
        let (eni, address) = self.choose(now).ok_or_else(|| Full {
            cooled_at: self.cooled_at(),
        })?;
        let lease = Lease {
            holder,
            address,
            eni,
            at: now,
            note: None,
        };
        self.watch.pending.insert(lease.holder.attachment.clone());
        self.commit(
            Record::Leased {
                lease: lease.clone(),
            },
            log,
        );
        Ok(lease)
    }

    /// The ADD is complete: the kernel side stands from now until DEL.
    pub fn confirm(&mut self, attachment: &Attachment) {
        self.watch.pending.remove(attachment);
    }

    /// Puts beside the lease what a restart needs to know of it.
    pub fn note(&mut self, attachment: &Attachment, note: String, log: &mut Vec<Record>) {
        if self
            .leases
            .get(attachment)
            .is_some_and(|lease| lease.note.as_ref() != Some(&note))
        {
            self.commit(
                Record::Noted {
                    attachment: attachment.clone(),
                    note,
                },
                log,
            );
        }
    }

    /// Says which pod a stranger is, with the note that a restart needs; see
    /// [`Holder::is_stranger`].
    pub fn recognise(
        &mut self,
        attachment: &Attachment,
        pod: PodRef,
        note: String,
        log: &mut Vec<Record>,
    ) {
        let Some(mut lease) = self.leases.get(attachment).cloned() else {
            return;
        };
        lease.holder.pod = pod;
        lease.note = Some(note);
        self.commit(Record::Leased { lease }, log);
    }

    /// Some of the record is lost, so that a lease without a note does not say that its ADD never
    /// ended: such holders are strangers from here on.
    pub(crate) fn distrust(&mut self) {
        let unnoted = self
            .leases
            .values_mut()
            .filter(|lease| lease.note.is_none());
        unnoted.for_each(|lease| lease.holder.netns.clear());
    }

    /// The ADD failed before any packet could have used the address.
    pub fn undo(&mut self, attachment: &Attachment, log: &mut Vec<Record>) {
        if self.leases.contains_key(attachment) {
            self.commit(
                Record::Undone {
                    attachment: attachment.clone(),
                },
                log,
            );
        }
    }

    /// Ends the attachment's lease; the address cools. Nothing to do for an attachment that holds
    /// none, whoever has its former address now.
    pub fn release(
        &mut self,
        attachment: &Attachment,
        now: Moment,
        log: &mut Vec<Record>,
    ) -> Option<Lease> {
        let lease = self.leases.get(attachment)?.clone();
        let until = now + self.config.cooldown;
        let attachment = attachment.clone();
        self.commit(
            Record::Freed {
                attachment,
                address: lease.address,
                until,
            },
            log,
        );
        Some(lease)
    }

    pub fn counts(&self, now: Moment) -> Counts {
        let mut counts = Counts {
            enis: count(self.enis.values()),
            max_enis: self.max_enis(),
            max_addresses: self.max_enis() * self.config.limits.secondary_per_eni(),
            arriving: self
                .intents
                .values()
                .map(|open| open.intent.action.arriving())
                .sum(),
            ..Counts::default()
        };
        for interface in self.enis.values() {
            let usable = interface.usable();
            for address in interface.addresses.values() {
                counts.total += 1;
                match address.slot {
                    Slot::Leased => counts.leased += 1,
                    _ if address.free_since(now).is_some() => {
                        counts.allocatable += u32::from(usable);
                    }
                    Slot::Free { from } if from > now => counts.cooling += 1,
                    Slot::Quarantined { .. } | Slot::Free { .. } => counts.quarantined += 1,
                    Slot::Leaving => {}
                }
            }
        }
        counts
    }

    /// Attachable interfaces, ours and others', as the instance type and MAX_ENI allow.
    pub(crate) fn max_enis(&self) -> u32 {
        let limit = self.config.limits.enis;
        self.config
            .targets
            .max_enis
            .filter(|max| *max > 0)
            .map_or(limit, |max| max.min(limit))
    }

    fn choose(&self, now: Moment) -> Option<(EniId, Ipv4Addr)> {
        let usable = self.enis.values().filter(|interface| interface.usable());
        let (interface, address, _) = usable
            .filter_map(|interface| {
                let free = interface.addresses.iter().filter_map(|(address, state)| {
                    Some((interface, *address, state.free_since(now)?))
                });
                free.min_by_key(|(_, address, since)| (*since, *address))
            })
            .max_by_key(|(interface, ..)| {
                (
                    interface.leased(),
                    std::cmp::Reverse(interface.eni.device_index),
                )
            })?;
        Some((interface.eni.id.clone(), address))
    }

    fn cooled_at(&self) -> Option<Moment> {
        let usable = self.enis.values().filter(|interface| interface.usable());
        usable
            .flat_map(|interface| interface.addresses.values())
            .filter_map(|address| match address.slot {
                Slot::Free { from } if address.misses == 0 => Some(from),
                _ => None,
            })
            .min()
    }

    pub(crate) fn commit(&mut self, record: Record, log: &mut Vec<Record>) {
        self.apply(&record);
        log.push(record);
    }

    /// True while EC2 is left in peace, see [`Pool::hold_growth`].
    pub fn is_held(&self, now: Moment) -> bool {
        now < self.pace.grow_after
    }

    /// EC2 refused or failed: ask for no more before `delay` is over.
    pub fn hold_growth(&mut self, delay: Duration, now: Moment) {
        self.pace.grow_after = self.pace.grow_after.max(now + delay);
    }
}
