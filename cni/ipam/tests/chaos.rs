//! A node lives through a hundred thousand random operations with crashes, torn journals, lost
//! answers and lagging views. EC2 and the kernel are simulated; the pool and its records are not.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::Ipv4Addr,
    time::Duration,
};

use proptest::{
    prelude::*,
    test_runner::{RngAlgorithm, TestRng},
};
use turnpike_ipam::{
    Action, Attachment, Config, Eni, EniId, EniView, Holder, Intent, Limits, Live, Moment, PodRef,
    Pool, Record, Targets, View, decode, encode,
};

const OPERATIONS: u32 = 100_000;
const LIMITS: Limits = Limits {
    enis: 3,
    addresses_per_eni: 6,
};

/// An interface as EC2 has it: attached or not, its secondary addresses, who made it.
type Held = (Option<Eni>, BTreeSet<Ipv4Addr>, Option<String>);

struct World {
    rng: TestRng,
    now: Moment,
    config: Config,
    // What is true outside the process.
    ec2: BTreeMap<EniId, Held>,
    kernel: BTreeMap<Attachment, Ipv4Addr>,
    next_eni: u32,
    next_host: u32,
    next_container: u32,
    stale: Option<View>,
    // What was promised to the runtime.
    added: BTreeMap<Attachment, Ipv4Addr>,
    gone: Vec<Attachment>,
    freed_at: BTreeMap<Ipv4Addr, Moment>,
    // The process and its disk.
    pool: Pool,
    journal: Vec<u8>,
    synced: usize,
    boot: u32,
    handled: Handled,
}

#[derive(Debug, Default)]
struct Handled {
    adds: u32,
    duplicates: u32,
    late_dels: u32,
    kills: u32,
    torn: u32,
    reboots: u32,
    unknown_done: u32,
    unknown_lost: u32,
    stale_views: u32,
    deleted: u32,
    unassigned: u32,
}

impl World {
    fn new(seed: [u8; 32], targets: Targets) -> Self {
        let config = Config {
            limits: LIMITS,
            targets,
            cooldown: Duration::from_secs(30),
        };
        let mut world = Self {
            rng: TestRng::from_seed(RngAlgorithm::ChaCha, &seed),
            now: Moment(1_000_000),
            config,
            ec2: BTreeMap::new(),
            kernel: BTreeMap::new(),
            next_eni: 0,
            next_host: 10,
            next_container: 0,
            stale: None,
            added: BTreeMap::new(),
            gone: Vec::new(),
            freed_at: BTreeMap::new(),
            pool: Pool::new(config),
            journal: Vec::new(),
            synced: 0,
            boot: 0,
            handled: Handled::default(),
        };
        let primary = world.make_eni(0);
        world
            .ec2
            .insert(primary.id.clone(), (Some(primary), BTreeSet::new(), None));
        world.start();
        world
    }

    fn pick(&mut self, below: usize) -> usize {
        (self.rng.next_u64() % below.max(1) as u64) as usize
    }

    fn chance(&mut self, percent: usize) -> bool {
        self.pick(100) < percent
    }

    fn host(&mut self) -> Ipv4Addr {
        // A small subnet, so that EC2 hands out the same addresses again and again.
        let used: BTreeSet<_> = self
            .ec2
            .values()
            .flat_map(|(_, addresses, _)| addresses.iter().copied())
            .collect();
        loop {
            self.next_host = self.next_host % 60 + 10;
            let address = Ipv4Addr::new(10, 0, 0, self.next_host as u8);
            self.next_host += 1;
            if !used.contains(&address) {
                return address;
            }
        }
    }

    fn make_eni(&mut self, device_index: u32) -> Eni {
        self.next_eni += 1;
        let n = self.next_eni;
        Eni {
            id: EniId::new(format!("eni-{n:04}")),
            mac: format!("02:00:00:00:{:02x}:{:02x}", n >> 8, n & 0xff),
            device_index,
            primary: Ipv4Addr::new(10, 0, (1 + n / 250) as u8, (n % 250) as u8),
            subnet: "10.0.0.0/18".parse().expect("a prefix"),
        }
    }

    fn log(&mut self, log: Vec<Record>) {
        log.iter()
            .for_each(|record| encode(record, &mut self.journal));
    }

    fn sync(&mut self) {
        self.synced = self.journal.len();
    }

    fn live(&self) -> Vec<Live> {
        let live = |(attachment, address): (&Attachment, &Ipv4Addr)| Live {
            address: *address,
            holder: holder(attachment.clone()),
        };
        self.kernel.iter().map(live).collect()
    }

    // ---- the runtime

    fn add(&mut self) {
        let again = self.chance(10) && !self.added.is_empty();
        let attachment = if again {
            let nth = self.pick(self.added.len());
            self.added
                .keys()
                .nth(nth)
                .cloned()
                .expect("it has that many")
        } else {
            self.next_container += 1;
            Attachment {
                container_id: format!("c{}", self.next_container),
                ifname: "eth0".into(),
            }
        };
        let mut log = Vec::new();
        let Ok(lease) = self
            .pool
            .lease(holder(attachment.clone()), self.now, &mut log)
        else {
            return;
        };
        self.log(log);
        if self.chance(3) {
            return self.kill(); // before the commit
        }
        self.sync();
        if again {
            assert_eq!(
                self.added[&attachment], lease.address,
                "ADD twice gave two leases"
            );
            self.handled.duplicates += 1;
            self.pool.confirm(&attachment);
            return;
        }
        let assigned = &self.ec2[&lease.eni].1;
        assert!(
            assigned.contains(&lease.address),
            "{} is not ours in EC2",
            lease.address
        );
        if let Some(freed) = self.freed_at.get(&lease.address) {
            let rested = self.now.since(*freed);
            assert!(
                rested >= self.config.cooldown,
                "{} rested {rested:?}",
                lease.address
            );
        }
        if self.chance(3) {
            return self.kill(); // after the commit, before the veth
        }
        if self.chance(5) {
            let mut log = Vec::new(); // the datapath failed
            self.pool.undo(&attachment, &mut log);
            return self.log(log);
        }
        self.kernel.insert(attachment.clone(), lease.address);
        self.added.insert(attachment.clone(), lease.address);
        self.pool.confirm(&attachment);
        self.handled.adds += 1;
    }

    fn del(&mut self) {
        if self.added.is_empty() {
            return;
        }
        let nth = self.pick(self.added.len());
        let attachment = self
            .added
            .keys()
            .nth(nth)
            .cloned()
            .expect("it has that many");
        let address = self.added.remove(&attachment).expect("it is there");
        self.kernel.remove(&attachment);
        self.freed_at.insert(address, self.now);
        let mut log = Vec::new();
        let released = self.pool.release(&attachment, self.now, &mut log);
        assert_eq!(released.map(|lease| lease.address), Some(address));
        self.log(log);
        self.gone.push(attachment);
        if self.chance(3) {
            return self.kill(); // the veth is gone, the release may not be on disk
        }
        self.sync();
    }

    fn late_del(&mut self) {
        if self.gone.is_empty() {
            return;
        }
        let nth = self.pick(self.gone.len());
        let attachment = self.gone[nth].clone();
        let mut log = Vec::new();
        // It may free a ghost of its own, but nothing of anybody else's.
        self.pool.release(&attachment, self.now, &mut log);
        self.log(log);
        self.sync();
        self.handled.late_dels += 1;
    }

    // ---- the cloud

    fn manage(&mut self) {
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

    fn finish(&mut self, intent: &Intent, created: Option<Eni>, gained: Vec<Ipv4Addr>) {
        let (mut log, id) = (Vec::new(), created.as_ref().map(|eni| eni.id.clone()));
        self.pool
            .finish(intent.id, created, gained, self.now, &mut log);
        if let Some(id) = id {
            self.pool.ready(&id);
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

    fn reconcile(&mut self, may_be_stale: bool) {
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
        outcome
            .unready
            .iter()
            .for_each(|eni| self.pool.ready(&eni.id));
        self.log(log);
    }

    // ---- accidents

    fn kill(&mut self) {
        self.handled.kills += 1;
        let unsynced = self.journal.len() - self.synced;
        let kept = self.synced + self.pick(unsynced + 1);
        self.journal.truncate(kept);
        if self.chance(20) {
            self.journal.extend([0, b'g', b'a', b'r', b'b', 0]);
            self.handled.torn += 1;
        }
        if self.chance(5) {
            self.boot += 1;
            self.handled.reboots += 1;
            self.now = Moment(50_000);
            // Pods do not outlive the machine.
            self.kernel.clear();
            self.gone
                .extend(std::mem::take(&mut self.added).into_keys());
            self.freed_at.clear();
        }
        self.start();
    }

    fn start(&mut self) {
        let (records, end, _) = decode(&self.journal);
        assert!(
            end >= self.synced,
            "something acknowledged was not read back"
        );
        self.journal.truncate(end);
        let mut pool = Pool::new(self.config);
        records.iter().for_each(|record| pool.apply(record));
        let mut log = Vec::new();
        pool.boot(&format!("boot-{}", self.boot), self.now, &mut log);
        if self.chance(50) {
            log.clear();
            let snapshot = pool.snapshot();
            pool = Pool::new(self.config);
            snapshot.iter().for_each(|record| pool.apply(record));
            self.journal.clear();
            log = snapshot;
        }
        self.pool = pool;
        self.log(log);
        for (attachment, address) in &self.added {
            let lease = self.pool.lease_of(attachment).map(|lease| lease.address);
            assert_eq!(lease, Some(*address), "{attachment} lost its lease");
        }
        let (live, mut log) = (self.live(), Vec::new());
        self.pool.restore(&live, self.now, &mut log);
        let ids: Vec<_> = self.pool.enis().map(|eni| eni.id.clone()).collect();
        ids.iter().for_each(|id| self.pool.ready(id));
        self.log(log);
        self.sync();
        self.reconcile(false);
    }

    fn step(&mut self) {
        self.now = self.now + Duration::from_millis(self.rng.next_u64() % 3_000);
        match self.pick(100) {
            0..35 => self.add(),
            35..65 => self.del(),
            65..72 => self.late_del(),
            72..88 => self.manage(),
            88..97 => self.reconcile(true),
            97..99 => self.kill(),
            _ => self.now = self.now + Duration::from_secs(400),
        }
        self.check();
    }

    fn check(&self) {
        let addresses: BTreeSet<_> = self.kernel.values().collect();
        assert_eq!(
            addresses.len(),
            self.kernel.len(),
            "two pods share an address"
        );
        for (attachment, address) in &self.added {
            let lease = self.pool.lease_of(attachment).map(|lease| lease.address);
            assert_eq!(lease, Some(*address), "{attachment} lost its lease");
            let assigned = self.ec2.values().any(|(_, held, _)| held.contains(address));
            assert!(assigned, "{address} of {attachment} was given back to EC2");
        }
        let held: u32 = self
            .ec2
            .values()
            .map(|(_, held, _)| held.len() as u32)
            .sum();
        assert!(held <= LIMITS.enis * LIMITS.secondary_per_eni());
    }

    /// After two looks in peace the pool is exactly what EC2 and the kernel hold.
    fn settle(&mut self) {
        for _ in 0..2 {
            self.now = self.now + Duration::from_secs(60);
            self.reconcile(false);
        }
        let leases: BTreeMap<_, _> = self
            .pool
            .leases()
            .map(|lease| (lease.holder.attachment.clone(), lease.address))
            .collect();
        assert_eq!(leases, self.kernel, "leaked or lost leases");
        for (id, (_, addresses, _)) in &self.ec2 {
            let known: BTreeSet<_> = self.pool.addresses(id).collect();
            let made_by_open_intent = self.pool.unresolved().next().is_some();
            assert!(
                known == *addresses || made_by_open_intent,
                "{id}: {known:?} {addresses:?}"
            );
        }
        let (records, ..) = decode(&self.journal);
        let mut replayed = Pool::new(self.config);
        records.iter().for_each(|record| replayed.apply(record));
        assert_eq!(
            replayed.snapshot(),
            self.pool.snapshot(),
            "the journal tells another story"
        );
    }
}

fn holder(attachment: Attachment) -> Holder {
    Holder {
        attachment,
        network: "turnpike".into(),
        pod: PodRef {
            namespace: "shop".into(),
            name: "web".into(),
            uid: String::new(),
        },
        netns: "/run/netns/x".into(),
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

fn live_through(seed: [u8; 32], targets: Targets, operations: u32) {
    let mut world = World::new(seed, targets);
    for n in 0..operations {
        world.step();
        if n % 500 == 499 {
            world.settle();
        }
    }
    world.settle();
    let Handled {
        adds,
        duplicates,
        late_dels,
        kills,
        torn,
        reboots,
        ..
    } = world.handled;
    for (what, times) in [
        ("ADD", adds),
        ("duplicate ADD", duplicates),
        ("late DEL", late_dels),
        ("kill", kills),
        ("torn tail", torn),
        ("reboot", reboots),
        ("unheard success", world.handled.unknown_done),
        ("unheard failure", world.handled.unknown_lost),
        ("stale view", world.handled.stale_views),
    ] {
        assert!(times > operations / 20_000, "too few of {what}: {times}");
    }
    println!("{:?}", world.handled);
}

#[test]
fn a_hundred_thousand_operations_lose_and_double_nothing() {
    let by_interface = Targets::default();
    let by_address = Targets {
        warm_addresses: Some(2),
        minimum_addresses: Some(3),
        ..by_interface
    };
    live_through([7; 32], by_interface, OPERATIONS / 2);
    live_through([8; 32], by_address, OPERATIONS / 2);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]

    #[test]
    fn any_seed_and_any_targets_hold(
        seed: [u8; 32],
        warm_enis in 0u32..3,
        warm_addresses in proptest::option::of(0u32..6),
        minimum_addresses in proptest::option::of(0u32..8),
        max_enis in proptest::option::of(1u32..4),
    ) {
        let targets = Targets { warm_enis, warm_addresses, minimum_addresses, max_enis };
        let mut world = World::new(seed, targets);
        for _ in 0..1_500 {
            world.step();
        }
        world.settle();
    }
}
