//! What to ask of EC2 so that the pool meets its targets.
//!
//! [`Pool::plan`] only proposes. The caller puts each action on record with [`Pool::begin`], which
//! looks once more whether it still fits, makes the call, and reports with `finish` or `fail`, or
//! with `unknown` where the answer did not come: then [`Pool::reconcile`] finds out.

use std::{cmp::Reverse, net::Ipv4Addr, time::Duration};

use serde::{Deserialize, Serialize};

use crate::{
    Eni, EniId, Moment, Pool, Record,
    pool::{Address, Interface, SHRINK_PAUSE, Slot, count},
};

/// An interface younger than this is kept: it was made for a burst that may go on.
const ENI_MIN_AGE: Duration = Duration::from_secs(60);
/// An interface that hangs on nothing is not one just being attached after this long.
const LEAKED_AFTER: Duration = Duration::from_secs(300);

/// A change to make in EC2.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "do", rename_all = "snake_case")]
pub enum Action {
    /// More addresses on an interface that has room.
    Assign { eni: EniId, count: u32 },
    /// Addresses that live pods use and EC2 does not hold for us any more: exactly these.
    Reclaim {
        eni: EniId,
        addresses: Vec<Ipv4Addr>,
    },
    /// Create and attach an interface that has this many addresses for pods.
    Create { addresses: u32 },
    Unassign {
        eni: EniId,
        addresses: Vec<Ipv4Addr>,
    },
    /// Detach, if it is attached, and delete.
    Delete { eni: EniId },
}

impl Action {
    /// Addresses that pods will be able to have when it succeeds.
    pub(crate) fn arriving(&self) -> u32 {
        match self {
            Self::Assign { count, .. } | Self::Create { addresses: count } => *count,
            Self::Reclaim { .. } | Self::Unassign { .. } | Self::Delete { .. } => 0,
        }
    }

    fn eni(&self) -> Option<&EniId> {
        match self {
            Self::Assign { eni, .. }
            | Self::Reclaim { eni, .. }
            | Self::Unassign { eni, .. }
            | Self::Delete { eni } => Some(eni),
            Self::Create { .. } => None,
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct IntentId(pub u64);

/// An action on record before its call.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Intent {
    pub id: IntentId,
    /// Makes the call idempotent where EC2 takes a client token, and marks what it made.
    pub token: String,
    pub at: Moment,
    pub action: Action,
}

/// How far the pool is from its targets: to grow by, to shrink by. One of them is 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Distance {
    short: u32,
    over: u32,
}

impl Pool {
    /// The actions that bring the pool to its targets, all that can run at the same time.
    pub fn plan(&self, now: Moment) -> Vec<Action> {
        let mut actions = self.leaks(now);
        if now >= self.pace.grow_after {
            actions.extend(self.reclaims());
        }
        let Distance { short, over } = self.distance(now);
        if short > 0 && now >= self.pace.grow_after {
            actions.extend(self.grow(short));
        } else if over > 0 && self.intents.is_empty() && now >= self.pace.shrink_after {
            actions.extend(self.shrink(over, now));
        }
        actions
    }

    /// Puts the action on record, unless the pool has changed so that it does not fit any more.
    /// `token` must be new.
    pub fn begin(
        &mut self,
        action: Action,
        token: String,
        now: Moment,
        log: &mut Vec<Record>,
    ) -> Option<Intent> {
        if !self.fits(&action, now) {
            return None;
        }
        if matches!(action, Action::Unassign { .. } | Action::Delete { .. }) {
            self.pace.shrink_after = now + SHRINK_PAUSE;
        }
        let intent = Intent {
            id: IntentId(self.next_intent),
            token,
            at: now,
            action,
        };
        self.commit(
            Record::Intended {
                intent: intent.clone(),
            },
            log,
        );
        self.resumed(intent.id);
        Some(intent)
    }

    /// Somebody is at work on the intent.
    pub fn resumed(&mut self, id: IntentId) {
        if let Some(open) = self.intents.get_mut(&id) {
            open.unknown = false;
        }
    }

    /// Intents whose outcome nobody waits for: after a restart, all that are open.
    pub fn unresolved(&self) -> impl Iterator<Item = &Intent> {
        self.intents
            .values()
            .filter(|open| open.unknown)
            .map(|open| &open.intent)
    }

    /// EC2 did it. `gained` are the addresses it named in its answer.
    pub fn finish(
        &mut self,
        id: IntentId,
        created: Option<Eni>,
        gained: Vec<Ipv4Addr>,
        now: Moment,
        log: &mut Vec<Record>,
    ) {
        let Some(open) = self.intents.get(&id) else {
            return;
        };
        let action = open.intent.action.clone();
        if let Some(eni) = &created {
            self.commit(
                Record::Eni {
                    eni: eni.clone(),
                    at: now,
                },
                log,
            );
        }
        let target = created.map(|eni| eni.id).or_else(|| action.eni().cloned());
        match (action, target) {
            (Action::Unassign { addresses, .. }, Some(eni)) => {
                self.commit(Record::Lost { eni, addresses }, log);
            }
            (Action::Delete { .. }, Some(eni)) => {
                self.watch.unattached.remove(&eni);
                self.commit(Record::EniGone { eni }, log);
            }
            (Action::Reclaim { addresses, .. }, Some(eni)) => self.found(&eni, &addresses),
            (Action::Assign { .. } | Action::Create { .. }, Some(eni)) => {
                self.gain(eni, gained, now, log);
            }
            (_, None) => {}
        }
        self.commit(Record::Settled { id }, log);
    }

    /// EC2 refused: nothing has changed there. Growth waits for `delay`.
    pub fn fail(&mut self, id: IntentId, delay: Duration, now: Moment, log: &mut Vec<Record>) {
        self.hold_growth(delay, now);
        self.commit(Record::Settled { id }, log);
    }

    /// No answer: EC2 may have done it or not. The intent stays open until a reconcile knows.
    pub fn unknown(&mut self, id: IntentId) {
        if let Some(open) = self.intents.get_mut(&id) {
            open.unknown = true;
        }
    }

    /// What EC2 has just assigned. What the pool knows already stays as it is: the outcome of a
    /// call can be half on record, and an address of it have cooled since. One that is somebody's,
    /// by the kernel, is not for the next pod.
    fn gain(&mut self, eni: EniId, gained: Vec<Ipv4Addr>, now: Moment, log: &mut Vec<Record>) {
        let known = |address: &Ipv4Addr| {
            let interface = self.enis.get(&eni);
            interface.is_some_and(|interface| interface.addresses.contains_key(address))
        };
        let (strays, free): (Vec<_>, Vec<_>) = gained
            .into_iter()
            .filter(|address| !known(address))
            .partition(|address| self.watch.strays.contains(address));
        if !strays.is_empty() {
            let record = Record::Quarantined {
                eni: eni.clone(),
                addresses: strays,
                until: now + self.config.cooldown,
            };
            self.commit(record, log);
        }
        if !free.is_empty() {
            let record = Record::Gained {
                eni,
                addresses: free,
                at: now,
            };
            self.commit(record, log);
        }
    }

    fn found(&mut self, eni: &EniId, addresses: &[Ipv4Addr]) {
        let Some(interface) = self.enis.get_mut(eni) else {
            return;
        };
        for address in addresses {
            if let Some(state) = interface.addresses.get_mut(address) {
                state.misses = 0;
            }
        }
    }

    /// Cooling addresses do not count as spare: a burst of new pods cannot have them.
    fn distance(&self, now: Moment) -> Distance {
        let counts = self.counts(now);
        let (have, expected) = (counts.allocatable + counts.arriving, self.watch.expected);
        let targets = self.config.targets;
        let (goal, floor) = match (targets.warm_addresses, targets.minimum_addresses) {
            (None, None) => {
                let warm = targets.warm_enis * self.config.limits.secondary_per_eni();
                ((warm + expected).max(1), 0)
            }
            (warm, minimum) => (warm.unwrap_or(0) + expected, minimum.unwrap_or(0)),
        };
        let total = counts.total + counts.arriving;
        let short = goal.saturating_sub(have).max(floor.saturating_sub(total));
        let over = have.saturating_sub(goal).min(total.saturating_sub(floor));
        Distance {
            short,
            over: if short > 0 { 0 } else { over },
        }
    }

    fn by_interface(&self) -> bool {
        let targets = self.config.targets;
        targets.warm_addresses.is_none() && targets.minimum_addresses.is_none()
    }

    /// Fills what is attached, the fullest first, then attaches more: all in one turn.
    fn grow(&self, short: u32) -> Vec<Action> {
        let per_eni = self.config.limits.secondary_per_eni();
        let whole = self.by_interface();
        let mut left = short;
        let mut actions = Vec::new();
        let mut interfaces: Vec<_> = self
            .enis
            .values()
            .filter(|eni| self.may_grow(eni))
            .collect();
        interfaces.sort_by_key(|eni| (Reverse(eni.leased()), eni.eni.device_index));
        for interface in interfaces {
            let room = self.room(interface);
            let count = if whole { room } else { room.min(left) };
            if left > 0 && count > 0 {
                actions.push(Action::Assign {
                    eni: interface.eni.id.clone(),
                    count,
                });
                left = left.saturating_sub(count);
            }
        }
        let creating: Vec<u32> = self
            .intents
            .values()
            .filter_map(|open| open.creating())
            .collect();
        // What is being attached takes more once it is there: that is cheaper than another one.
        let coming: u32 = creating
            .iter()
            .map(|count| per_eni.saturating_sub(*count))
            .sum();
        left = left.saturating_sub(coming);
        let used = count(self.enis.values()) + count(creating.iter()) + self.watch.unmanaged;
        for _ in used..self.max_enis() {
            let count = if whole { per_eni } else { per_eni.min(left) };
            if left > 0 && count > 0 {
                actions.push(Action::Create { addresses: count });
                left = left.saturating_sub(count);
            }
        }
        actions
    }

    /// While addresses of it are being given back, EC2 could name the same ones again, and the
    /// two answers would not say which came last.
    fn may_grow(&self, interface: &Interface) -> bool {
        let returning = |action: &Action| {
            matches!(action, Action::Unassign { .. }) && action.eni() == Some(&interface.eni.id)
        };
        !interface.leaving
            && !self
                .intents
                .values()
                .any(|open| returning(&open.intent.action))
    }

    fn room(&self, interface: &Interface) -> u32 {
        let assigning: u32 = self
            .intents
            .values()
            .filter(|open| open.intent.action.eni() == Some(&interface.eni.id))
            .map(|open| open.intent.action.arriving())
            .sum();
        let held = count(interface.addresses.keys()) + assigning;
        self.config.limits.secondary_per_eni().saturating_sub(held)
    }

    /// One step: a whole interface that no pod needs, else spare addresses where targets are
    /// counted in addresses.
    fn shrink(&self, over: u32, now: Moment) -> Option<Action> {
        let removable = self.enis.values().find(|interface| {
            let idle = |address: &Address| address.free_since(now).is_some();
            !interface.eni.is_primary()
                && now.since(interface.since) >= ENI_MIN_AGE
                && interface.addresses.values().all(idle)
                && interface.free(now) <= over
        });
        if let Some(interface) = removable {
            return Some(Action::Delete {
                eni: interface.eni.id.clone(),
            });
        }
        if self.by_interface() {
            return None;
        }
        let with_spare = self
            .enis
            .values()
            .filter(|interface| interface.free(now) > 0);
        let emptiest =
            with_spare.min_by_key(|eni| (eni.leased(), Reverse(eni.eni.device_index)))?;
        let free = |(address, state): (&Ipv4Addr, &Address)| {
            state.free_since(now).is_some().then_some(*address)
        };
        let addresses: Vec<_> = emptiest
            .addresses
            .iter()
            .filter_map(free)
            .take(over as usize)
            .collect();
        Some(Action::Unassign {
            eni: emptiest.eni.id.clone(),
            addresses,
        })
    }

    /// Addresses of live pods that EC2 has not listed twice.
    fn reclaims(&self) -> Vec<Action> {
        let missing = self.enis.values().map(|interface| {
            let lost = |state: &Address| state.slot == Slot::Leased && state.misses >= 2;
            let addresses: Vec<_> = interface
                .addresses
                .iter()
                .filter(|(_, state)| lost(state))
                .map(|(address, _)| *address)
                .collect();
            (interface.eni.id.clone(), addresses)
        });
        missing
            .filter(|(eni, addresses)| !addresses.is_empty() && !self.busy(eni))
            .map(|(eni, addresses)| Action::Reclaim { eni, addresses })
            .collect()
    }

    /// Interfaces of ours that hang on nothing, since long enough that no attach is under way.
    fn leaks(&self, now: Moment) -> Vec<Action> {
        self.watch
            .unattached
            .iter()
            .filter(|(eni, since)| now.since(**since) >= LEAKED_AFTER && !self.busy(eni))
            .map(|(eni, _)| Action::Delete { eni: eni.clone() })
            .collect()
    }

    fn busy(&self, eni: &EniId) -> bool {
        self.intents
            .values()
            .any(|open| open.intent.action.eni() == Some(eni))
    }

    fn fits(&self, action: &Action, now: Moment) -> bool {
        match action {
            Action::Assign { eni, .. } | Action::Reclaim { eni, .. } => self
                .enis
                .get(eni)
                .is_some_and(|interface| !interface.leaving),
            Action::Create { .. } => true,
            Action::Unassign { eni, addresses } => self.enis.get(eni).is_some_and(|interface| {
                let idle = |address| {
                    let state: Option<&Address> = interface.addresses.get(address);
                    state.is_some_and(|state| state.free_since(now).is_some())
                };
                addresses.iter().all(idle)
            }),
            Action::Delete { eni } => match self.enis.get(eni) {
                Some(interface) => {
                    let mut states = interface.addresses.values();
                    !interface.eni.is_primary()
                        && states.all(|state| state.free_since(now).is_some())
                        && !self.leases.values().any(|lease| lease.eni == *eni)
                }
                None => self.watch.unattached.contains_key(eni),
            },
        }
    }
}
