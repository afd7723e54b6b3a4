//! Any single mutation of a sealed chain is found, also by somebody who computes all later hashes
//! anew but does not hold the node's key.

#![allow(clippy::unwrap_used, reason = "a test fails where it panics")]

use std::time::{Duration, SystemTime};

use proptest::prelude::*;
use turnpike_certs::{Authority, Credentials, KeyRequest, LEAF_LIFETIME, TrustBundle};
use turnpike_ledger::{Chain, Checkpoint, Entry, Event, Head, Problem, Record, Trust, verify};
use turnpike_rules::Identity;

const NODE: &str = "node-a";
const NOW: i64 = 1_800_000_000_000;
const GATE: &str = "spiffe://cluster.local/ns/turnpike-system/sa/turnpike-gate";

struct World {
    authority: Authority,
    roots: TrustBundle,
}

fn now() -> SystemTime {
    SystemTime::UNIX_EPOCH + Duration::from_millis(NOW.unsigned_abs())
}

impl World {
    fn new() -> Self {
        let authority = Authority::generate("cluster.local", 10 * LEAF_LIFETIME, now()).unwrap();
        let roots = TrustBundle::from_pem(authority.certificate_pem().as_bytes()).unwrap();
        Self { authority, roots }
    }

    fn signer(&self, identity: &str) -> Credentials {
        let identity: Identity = identity.parse().unwrap();
        let request = KeyRequest::new(&identity).unwrap();
        let issued = self
            .authority
            .sign(request.csr_pem(), &identity, LEAF_LIFETIME, now())
            .unwrap();
        request
            .into_credentials(&issued.chain, self.roots.clone())
            .unwrap()
    }

    fn trust(&self) -> Trust {
        Trust {
            roots: self.roots.clone(),
            signer: GATE.parse().unwrap(),
        }
    }
}

fn record(event: Event) -> Vec<u8> {
    Record {
        time_ms: NOW,
        node: NODE.into(),
        event,
    }
    .encode()
}

fn lost(n: usize) -> Vec<u8> {
    record(Event::Lost {
        connection: format!("boot-{n}"),
    })
}

/// `n` entries with a checkpoint after every fifth and at the end.
fn chain(n: usize, signer: &Credentials) -> Vec<Entry> {
    let mut chain = Chain::begin(NODE);
    let mut entries = Vec::new();
    for i in 1..=n {
        entries.push(chain.append(lost(i)));
        if i % 5 == 0 || i == n {
            let checkpoint = Checkpoint::sign(signer, NODE, &chain.head(), NOW).unwrap();
            entries.push(chain.append(record(Event::Checkpoint(checkpoint))));
        }
    }
    entries
}

fn rehash(entries: &mut [Entry]) {
    let mut chain = Chain::begin(NODE);
    for entry in entries {
        *entry = chain.append(std::mem::take(&mut entry.body));
    }
}

fn last_checkpoint(entries: &[Entry]) -> Checkpoint {
    let decode = |e: &Entry| match Record::decode(&e.body).unwrap().event {
        Event::Checkpoint(checkpoint) => Some(checkpoint),
        _ => None,
    };
    entries.iter().rev().find_map(decode).unwrap()
}

#[derive(Clone, Debug)]
enum Mutation {
    FlipBody(usize, usize, u8),
    FlipHash(usize, usize, u8),
    Renumber(usize, u64),
    Remove(usize),
    Repeat(usize),
    Swap(usize, usize),
    Insert(usize),
    Cut(usize),
}

fn mutation() -> impl Strategy<Value = Mutation> {
    let at = any::<usize>;
    prop_oneof![
        (at(), at(), 1u8..).prop_map(|(i, j, x)| Mutation::FlipBody(i, j, x)),
        (at(), at(), 1u8..).prop_map(|(i, j, x)| Mutation::FlipHash(i, j, x)),
        (at(), any::<u64>()).prop_map(|(i, n)| Mutation::Renumber(i, n)),
        at().prop_map(Mutation::Remove),
        at().prop_map(Mutation::Repeat),
        (at(), at()).prop_map(|(i, j)| Mutation::Swap(i, j)),
        at().prop_map(Mutation::Insert),
        at().prop_map(Mutation::Cut),
    ]
}

fn mutate(entries: &mut Vec<Entry>, mutation: &Mutation) {
    let n = entries.len();
    match *mutation {
        Mutation::FlipBody(i, j, x) => {
            let body = &mut entries[i % n].body;
            let j = j % body.len();
            body[j] ^= x;
        }
        Mutation::FlipHash(i, j, x) => entries[i % n].hash[j % 32] ^= x,
        Mutation::Renumber(i, to) => entries[i % n].sequence = to,
        Mutation::Remove(i) => drop(entries.remove(i % n)),
        Mutation::Repeat(i) => entries.insert(i % n, entries[i % n].clone()),
        Mutation::Swap(i, j) => entries.swap(i % n, j % n),
        Mutation::Insert(i) => {
            let forged = Entry {
                sequence: (i % n) as u64 + 1,
                body: lost(0),
                hash: [0; 32],
            };
            entries.insert(i % n, forged);
        }
        Mutation::Cut(i) => entries.truncate(i % n),
    }
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(256) })]

    #[test]
    fn any_single_mutation_is_found(n in 1usize..24, mutation in mutation(), forge in any::<bool>()) {
        let world = World::new();
        let good = chain(n, &world.signer(GATE));
        let latest = last_checkpoint(&good);
        let report = verify(NODE, &good, &world.trust(), Some(&latest), NOW);
        prop_assert!(report.holds(), "{:?}", report.problems);
        prop_assert_eq!(report.unsealed(), 1, "the last checkpoint's own entry alone");

        let mut bad = good.clone();
        mutate(&mut bad, &mutation);
        if forge {
            rehash(&mut bad);
        }
        prop_assume!(bad != good);
        // The entry of the last checkpoint is vouched for by nothing but that checkpoint, which the
        // verifier holds; losing or changing what carries it takes nothing from the record.
        let sealed = latest.sequence as usize;
        prop_assume!(bad.get(..sealed) != good.get(..sealed));
        let report = verify(NODE, &bad, &world.trust(), Some(&latest), NOW);
        prop_assert!(!report.holds(), "{mutation:?} was not found");
    }
}

#[test]
fn a_cut_end_is_found_by_a_checkpoint_from_elsewhere() {
    let world = World::new();
    let entries = chain(12, &world.signer(GATE));
    let latest = last_checkpoint(&entries);
    let cut = &entries[..5];
    assert!(
        verify(NODE, cut, &world.trust(), None, NOW).holds(),
        "whole as far as it goes"
    );
    let report = verify(NODE, cut, &world.trust(), Some(&latest), NOW);
    assert_eq!(
        report.problems,
        [Problem::Truncated {
            last: 5,
            expected: latest.sequence
        }]
    );
}

#[test]
fn only_the_gate_signs() {
    let world = World::new();
    let other = "spiffe://cluster.local/ns/shop/sa/web";
    let report = verify(
        NODE,
        &chain(3, &world.signer(other)),
        &world.trust(),
        None,
        NOW,
    );
    assert!(
        matches!(&report.problems[..], [Problem::BadCheckpoint { .. }]),
        "{report:?}"
    );
    assert_eq!(report.sealed, 0);

    let foreign = World::new();
    let report = verify(
        NODE,
        &chain(3, &foreign.signer(GATE)),
        &world.trust(),
        None,
        NOW,
    );
    assert!(
        matches!(&report.problems[..], [Problem::BadCheckpoint { .. }]),
        "{report:?}"
    );
}

#[test]
fn another_nodes_chain_is_not_this_nodes() {
    let world = World::new();
    let entries = chain(3, &world.signer(GATE));
    let report = verify("node-b", &entries, &world.trust(), None, NOW);
    assert!(
        report.problems.contains(&Problem::Changed { sequence: 1 }),
        "{report:?}"
    );
}

#[test]
fn a_checkpoint_from_the_future_or_with_an_old_certificate_is_refused() {
    let world = World::new();
    let signer = world.signer(GATE);
    let head = Head::genesis(NODE);
    let soon = Checkpoint::sign(&signer, NODE, &head, NOW + 60_000).unwrap();
    assert_eq!(soon.verify(&world.trust(), NOW), Ok(()));
    let future = Checkpoint::sign(&signer, NODE, &head, NOW + 3_600_000).unwrap();
    assert!(future.verify(&world.trust(), NOW).is_err());
    let day = 24 * 3_600_000;
    let expired = Checkpoint::sign(&signer, NODE, &head, NOW + 2 * day).unwrap();
    assert!(expired.verify(&world.trust(), NOW + 2 * day).is_err());
    assert_eq!(
        soon.verify(&world.trust(), NOW + 365 * day),
        Ok(()),
        "records live for years"
    );
}

/// Changes the first entry and computes all that follows anew; `rewrite` is what the forger makes
/// of each checkpoint.
fn forge(entries: &[Entry], rewrite: impl Fn(Checkpoint, Head) -> Checkpoint) -> Vec<Entry> {
    let mut chain = Chain::begin(NODE);
    let bodies = entries.iter().enumerate().map(|(n, entry)| {
        let event = Record::decode(&entry.body).unwrap().event;
        (n, event)
    });
    let mut forged = Vec::new();
    for (n, event) in bodies {
        let body = match event {
            Event::Checkpoint(checkpoint) => {
                record(Event::Checkpoint(rewrite(checkpoint, chain.head())))
            }
            _ if n == 0 => lost(999),
            other => record(other),
        };
        forged.push(chain.append(body));
    }
    forged
}

#[test]
fn a_forger_without_the_key_cannot_make_the_chain_hold_again() {
    let world = World::new();
    let entries = chain(12, &world.signer(GATE));
    let problems = |entries: &[Entry]| verify(NODE, entries, &world.trust(), None, NOW).problems;
    assert_eq!(problems(&entries), []);

    let kept = forge(&entries, |checkpoint, _| checkpoint);
    let found = problems(&kept);
    assert!(
        matches!(found[..], [Problem::CheckpointMismatch { .. }, ..]),
        "{found:?}"
    );

    let rewritten = forge(&entries, |checkpoint, head| Checkpoint {
        head: hex::encode(head.hash),
        ..checkpoint
    });
    let found = problems(&rewritten);
    assert!(
        matches!(found[..], [Problem::BadCheckpoint { .. }, ..]),
        "{found:?}"
    );

    let foreign = World::new().signer(GATE);
    let resigned = forge(&entries, |_, head| {
        Checkpoint::sign(&foreign, NODE, &head, NOW).unwrap()
    });
    let found = problems(&resigned);
    assert!(
        matches!(found[..], [Problem::BadCheckpoint { .. }, ..]),
        "{found:?}"
    );
    assert_eq!(verify(NODE, &resigned, &world.trust(), None, NOW).sealed, 0);
}
