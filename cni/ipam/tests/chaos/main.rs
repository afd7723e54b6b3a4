//! A node lives through a hundred thousand random operations with crashes, torn journals, lost
//! answers and lagging views. EC2 and the kernel are simulated; the pool and its records are not.

mod cloud;
mod runtime;

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
    Attachment, Config, Eni, EniId, Limits, Live, Moment, Pool, Record, Targets, View, decode,
    encode,
};

use self::runtime::holder;

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
    /// Interfaces whose routes stand.
    routed: BTreeSet<EniId>,
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
            routed: BTreeSet::new(),
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
        ids.iter().for_each(|id| self.ready(id));
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
