//! What each record means: the fold that makes the pool.

use std::{collections::BTreeMap, net::Ipv4Addr};

use crate::{
    Action, Attachment, Eni, EniId, Intent, IntentId, Lease, Moment, Pool, Record,
    pool::{Address, Interface, Open, Slot},
};

impl Pool {
    /// What the record means. Total: a record that fits nothing changes nothing, so that a journal
    /// cut at any place still folds.
    pub fn apply(&mut self, record: &Record) {
        match record {
            Record::Boot { id, at } => self.apply_boot(id, *at),
            Record::Eni { eni, at } => self.apply_eni(eni, *at),
            Record::EniGone { eni } => {
                self.enis.remove(eni);
            }
            Record::Gained { eni, addresses, at } => {
                self.insert(eni, addresses, Slot::Free { from: *at });
            }
            Record::Quarantined {
                eni,
                addresses,
                until,
            } => {
                self.insert(eni, addresses, Slot::Quarantined { until: *until });
            }
            Record::Lost { eni, addresses } => {
                if let Some(interface) = self.enis.get_mut(eni) {
                    interface
                        .addresses
                        .retain(|address, _| !addresses.contains(address));
                }
            }
            Record::Leased { lease } => self.apply_leased(lease),
            Record::Noted { attachment, note } => {
                if let Some(lease) = self.leases.get_mut(attachment) {
                    lease.note = Some(note.clone());
                }
            }
            Record::Freed {
                attachment,
                address,
                until,
            } => {
                self.seen = self.seen.max(until.before(self.config.cooldown));
                self.end(attachment, Some(*address), Slot::Free { from: *until });
            }
            Record::Undone { attachment } => {
                let from = self
                    .leases
                    .get(attachment)
                    .map_or(Moment(0), |lease| lease.at);
                self.end(attachment, None, Slot::Free { from });
            }
            Record::Intended { intent } => self.apply_intended(intent),
            Record::Settled { id } => self.apply_settled(*id),
        }
    }

    fn apply_boot(&mut self, id: &str, at: Moment) {
        self.boot = Some(id.to_owned());
        let seen = std::mem::replace(&mut self.seen, at);
        let cooled = at + self.config.cooldown;
        for interface in self.enis.values_mut() {
            interface.since = at;
            for address in interface.addresses.values_mut() {
                address.slot = match address.slot {
                    Slot::Free { from } if from > seen => Slot::Free { from: cooled },
                    Slot::Free { .. } => Slot::Free { from: at },
                    Slot::Quarantined { .. } => Slot::Quarantined { until: cooled },
                    slot @ (Slot::Leased | Slot::Leaving) => slot,
                };
            }
        }
        self.leases.values_mut().for_each(|lease| lease.at = at);
        self.intents
            .values_mut()
            .for_each(|open| open.intent.at = at);
    }

    fn apply_eni(&mut self, eni: &Eni, at: Moment) {
        let known = self
            .enis
            .entry(eni.id.clone())
            .or_insert_with(|| Interface {
                eni: eni.clone(),
                since: at,
                addresses: BTreeMap::new(),
                ready: false,
                leaving: false,
                misses: 0,
            });
        known.eni = eni.clone();
    }

    fn insert(&mut self, eni: &EniId, addresses: &[Ipv4Addr], slot: Slot) {
        let Some(interface) = self.enis.get_mut(eni) else {
            return;
        };
        for address in addresses
            .iter()
            .filter(|address| **address != interface.eni.primary)
        {
            let slot = if self.holders.contains_key(address) {
                Slot::Leased
            } else {
                slot
            };
            interface.addresses.insert(*address, Address::new(slot));
        }
    }

    fn apply_leased(&mut self, lease: &Lease) {
        // The journal may have missed an end (its disk was full then), never a beginning.
        if let Some(former) = self.holders.get(&lease.address).cloned() {
            self.end(&former, None, Slot::Free { from: lease.at });
        }
        let cooled = lease.at + self.config.cooldown;
        self.end(&lease.holder.attachment, None, Slot::Free { from: cooled });
        self.seen = self.seen.max(lease.at);
        self.holders
            .insert(lease.address, lease.holder.attachment.clone());
        self.leases
            .insert(lease.holder.attachment.clone(), lease.clone());
        if let Some(interface) = self.enis.get_mut(&lease.eni) {
            interface
                .addresses
                .insert(lease.address, Address::new(Slot::Leased));
        }
    }

    fn end(&mut self, attachment: &Attachment, only: Option<Ipv4Addr>, slot: Slot) {
        let Some(lease) = self.leases.get(attachment) else {
            return;
        };
        if only.is_some_and(|address| address != lease.address) {
            return;
        }
        let (address, eni) = (lease.address, lease.eni.clone());
        self.leases.remove(attachment);
        self.holders.remove(&address);
        self.watch.pending.remove(attachment);
        self.watch.lease_misses.remove(attachment);
        let interface = self.enis.get_mut(&eni);
        if let Some(state) = interface.and_then(|interface| interface.addresses.get_mut(&address)) {
            state.slot = slot;
        }
    }

    fn apply_intended(&mut self, intent: &Intent) {
        self.next_intent = self.next_intent.max(intent.id.0 + 1);
        self.seen = self.seen.max(intent.at);
        match &intent.action {
            Action::Unassign { eni, addresses } => {
                if let Some(interface) = self.enis.get_mut(eni) {
                    for address in addresses {
                        if let Some(state) = interface.addresses.get_mut(address) {
                            state.slot = Slot::Leaving;
                        }
                    }
                }
            }
            Action::Delete { eni } => {
                if let Some(interface) = self.enis.get_mut(eni) {
                    interface.leaving = true;
                    // Its routes go first, and do not come back by themselves if EC2 refuses.
                    interface.ready = false;
                }
            }
            Action::Assign { .. } | Action::Reclaim { .. } | Action::Create { .. } => {}
        }
        // Whoever made the call is gone when this is read from disk; `begin` knows better.
        self.intents.insert(
            intent.id,
            Open {
                intent: intent.clone(),
                unknown: true,
            },
        );
    }

    fn apply_settled(&mut self, id: IntentId) {
        let Some(open) = self.intents.remove(&id) else {
            return;
        };
        match open.intent.action {
            Action::Unassign { eni, addresses } => {
                if let Some(interface) = self.enis.get_mut(&eni) {
                    for address in addresses {
                        if let Some(state) = interface.addresses.get_mut(&address)
                            && state.slot == Slot::Leaving
                        {
                            state.slot = Slot::Free {
                                from: open.intent.at,
                            };
                        }
                    }
                }
            }
            Action::Delete { eni } => {
                if let Some(interface) = self.enis.get_mut(&eni) {
                    interface.leaving = false;
                }
            }
            Action::Assign { .. } | Action::Reclaim { .. } | Action::Create { .. } => {}
        }
    }

    /// The records that make this pool out of nothing: what compaction writes.
    pub fn snapshot(&self) -> Vec<Record> {
        let mut records = Vec::new();
        if let Some(id) = &self.boot {
            records.push(Record::Boot {
                id: id.clone(),
                at: self.seen,
            });
        }
        for interface in self.enis.values() {
            let eni = &interface.eni.id;
            records.push(Record::Eni {
                eni: interface.eni.clone(),
                at: interface.since,
            });
            for (address, state) in &interface.addresses {
                let (eni, addresses) = (eni.clone(), vec![*address]);
                records.push(match state.slot {
                    Slot::Quarantined { until } => Record::Quarantined {
                        eni,
                        addresses,
                        until,
                    },
                    Slot::Free { from } => Record::Gained {
                        eni,
                        addresses,
                        at: from,
                    },
                    Slot::Leased | Slot::Leaving => Record::Gained {
                        eni,
                        addresses,
                        at: interface.since,
                    },
                });
            }
        }
        records.extend(self.leases.values().map(|lease| Record::Leased {
            lease: lease.clone(),
        }));
        records.extend(self.intents.values().map(|open| Record::Intended {
            intent: open.intent.clone(),
        }));
        records
    }
}
