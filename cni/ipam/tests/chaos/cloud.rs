//! What is asked of EC2, what it does and what it says.

use std::{collections::BTreeSet, net::Ipv4Addr, time::Duration};

use proptest::prelude::Rng;
use turnpike_ipam::{Action, Eni, EniId, EniView, Intent, View};

use super::World;

impl World {
    pub(crate) fn manage(&mut self) {
        for action in self.pool.plan(self.now) {
            let token = format!("t{}", self.rng.next_u64());
            let mut log = Vec::new();
            let intent = self.pool.begin(action, token, self.now, &mut log);
            self.log(log);
            self.sync();
            let Some(intent) = intent else { continue };
            if self.chance(3) {
                return self.kill(); // announced, not called
            }
            if let Action::Delete { eni } = &intent.action {
                self.routed.remove(eni); // before EC2 is asked
            }
            if self.chance(10) {
                let mut log = Vec::new();
                self.pool
                    .fail(intent.id, Duration::from_secs(5), self.now, &mut log);
                self.log(log);
                continue;
            }
            if intent_eni(&intent).is_some_and(|eni| !self.ec2.contains_key(eni)) {
                let mut log = Vec::new(); // NotFound: a lost Delete had been done
                self.pool
                    .fail(intent.id, Duration::ZERO, self.now, &mut log);
                self.log(log);
                continue;
            }
            let answer = (!self.chance(10)).then(|| self.call(&intent));
            match answer {
                None if self.chance(50) => {
                    self.call(&intent); // done, but nobody heard
                    self.pool.unknown(intent.id);
                    self.handled.unknown_done += 1;
                }
                None => {
                    self.pool.unknown(intent.id);
                    self.handled.unknown_lost += 1;
                }
                Some(_) if self.chance(3) => return self.kill(), // done, answer not on record
                Some((created, gained)) => self.finish(&intent, created, gained),
            }
        }
        let unresolved: Vec<_> = self.pool.unresolved().cloned().collect();
        for intent in unresolved
            .iter()
            .filter(|it| matches!(it.action, Action::Create { .. }))
        {
            let (created, gained) = self.call(intent);
            self.finish(intent, created, gained);
        }
    }

    pub(crate) fn ready(&mut self, eni: &EniId) {
        self.routed.insert(eni.clone());
        self.pool.ready(eni);
    }

    fn finish(&mut self, intent: &Intent, created: Option<Eni>, gained: Vec<Ipv4Addr>) {
        let (mut log, id) = (Vec::new(), created.as_ref().map(|eni| eni.id.clone()));
        self.pool
            .finish(intent.id, created, gained, self.now, &mut log);
        if let Some(id) = id {
            self.ready(&id);
        }
        self.log(log);
    }

    fn call(&mut self, intent: &Intent) -> (Option<Eni>, Vec<Ipv4Addr>) {
        match &intent.action {
            Action::Assign { eni, count } => {
                let room = 5 - self.ec2[eni].1.len();
                let gained: Vec<_> = (0..room.min(*count as usize))
                    .map(|_| {
                        let address = self.host();
                        self.ec2.get_mut(eni).expect("attached").1.insert(address);
                        address
                    })
                    .collect();
                (None, gained)
            }
            Action::Reclaim { .. } => (None, Vec::new()),
            Action::Create { addresses } => self.create(*addresses, &intent.token),
            Action::Unassign { eni, addresses } => {
                self.handled.unassigned += 1;
                for address in addresses {
                    self.assert_unused(*address);
                    self.ec2.get_mut(eni).expect("attached").1.remove(address);
                }
                (None, Vec::new())
            }
            Action::Delete { eni } => {
                self.handled.deleted += 1;
                let gone = self.ec2.remove(eni);
                for address in gone.into_iter().flat_map(|(_, addresses, _)| addresses) {
                    self.assert_unused(address);
                }
                (None, Vec::new())
            }
        }
    }

    fn create(&mut self, count: u32, token: &str) -> (Option<Eni>, Vec<Ipv4Addr>) {
        let made = self
            .ec2
            .values()
            .find(|(_, _, by)| by.as_deref() == Some(token))
            .cloned();
        if let Some((eni, addresses, _)) = made {
            return (eni, addresses.into_iter().collect());
        }
        let used: BTreeSet<_> = self
            .ec2
            .values()
            .filter_map(|(eni, ..)| Some(eni.as_ref()?.device_index))
            .collect();
        let index = (1..)
            .find(|index| !used.contains(index))
            .expect("there are many");
        let eni = self.make_eni(index);
        let mut addresses = BTreeSet::new();
        self.ec2.insert(
            eni.id.clone(),
            (Some(eni.clone()), BTreeSet::new(), Some(token.into())),
        );
        for _ in 0..count {
            let address = self.host();
            addresses.insert(address);
            self.ec2
                .get_mut(&eni.id)
                .expect("just made")
                .1
                .insert(address);
        }
        (Some(eni), addresses.into_iter().collect())
    }

    fn assert_unused(&self, address: Ipv4Addr) {
        assert!(
            !self.kernel.values().any(|used| *used == address),
            "{address} is in use"
        );
    }

    fn view(&self) -> View {
        let enis = self
            .ec2
            .iter()
            .map(|(id, (eni, addresses, token))| EniView {
                attached: eni.clone(),
                id: id.clone(),
                addresses: addresses.iter().copied().collect(),
                token: token.clone(),
                managed: true,
            })
            .collect();
        View {
            asked_at: self.now,
            enis,
        }
    }

    pub(crate) fn reconcile(&mut self, may_be_stale: bool) {
        let mut view = self.view();
        if may_be_stale && self.chance(30) {
            // EC2's answers lag by a few changes, but not for two looks.
            if let Some(old) = self.stale.take() {
                view.enis = old.enis;
                self.handled.stale_views += 1;
            }
        } else {
            self.stale = Some(self.view());
        }
        let (live, mut log) = (self.live(), Vec::new());
        let outcome = self.pool.reconcile(&view, &live, self.now, &mut log);
        outcome.unready.iter().for_each(|eni| self.ready(&eni.id));
        self.log(log);
    }
}

fn intent_eni(intent: &Intent) -> Option<&EniId> {
    match &intent.action {
        Action::Create { .. } => None,
        Action::Assign { eni, .. }
        | Action::Reclaim { eni, .. }
        | Action::Unassign { eni, .. }
        | Action::Delete { eni } => Some(eni),
    }
}
