//! Reading a chain from its beginning and telling everything that is wrong with it.

use std::fmt;

use serde::Serialize;

use crate::{
    chain::{Entry, Head},
    checkpoint::{Checkpoint, CheckpointError, Trust},
    record::{Event, Record},
};

/// Beyond this many problems only their number is kept.
const MAX_PROBLEMS: usize = 1000;

/// What a verification found.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Report {
    pub node: String,
    pub entries: u64,
    /// Sequence of the last entry.
    pub last: u64,
    pub checkpoints: u64,
    /// Up to here a good checkpoint vouches for every entry.
    pub sealed: u64,
    /// Time of that checkpoint.
    pub sealed_ms: i64,
    /// Gaps that the gate itself noted: records it could not keep.
    pub noted_gaps: u64,
    pub restarts: u64,
    /// Connections whose end a crash took.
    pub lost: u64,
    /// Empty: nothing was changed, left out, moved or cut off up to `sealed`.
    pub problems: Vec<Problem>,
    /// How many more there were.
    pub more_problems: u64,
}

impl Report {
    pub fn holds(&self) -> bool {
        self.problems.is_empty()
    }

    /// Entries after the last good checkpoint: chained, but not vouched for yet.
    pub fn unsealed(&self) -> u64 {
        self.last.saturating_sub(self.sealed)
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(tag = "problem", rename_all = "snake_case")]
pub enum Problem {
    /// Entries are missing between these two.
    Gap {
        after: u64,
        next: u64,
    },
    /// An entry stands where a later one was due.
    OutOfOrder {
        sequence: u64,
        after: u64,
    },
    /// The hash does not follow from the entry before and the body.
    Changed {
        sequence: u64,
    },
    /// Not a record of this version.
    Malformed {
        sequence: u64,
        reason: String,
    },
    /// An entry that says it is another node's.
    WrongNode {
        sequence: u64,
        node: String,
    },
    /// A checkpoint that vouches for another chain than this one.
    CheckpointMismatch {
        sequence: u64,
    },
    BadCheckpoint {
        sequence: u64,
        reason: String,
    },
    /// A checkpoint known from elsewhere is later than the last entry.
    Truncated {
        last: u64,
        expected: u64,
    },
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Gap { after, next } => {
                write!(
                    f,
                    "entries {} to {} are missing",
                    after + 1,
                    next.saturating_sub(1)
                )
            }
            Self::OutOfOrder { sequence, after } => {
                write!(f, "entry {sequence} stands after entry {after}")
            }
            Self::Changed { sequence } => {
                write!(f, "entry {sequence}, or the one before it, was changed")
            }
            Self::Malformed { sequence, reason } => write!(f, "entry {sequence}: {reason}"),
            Self::WrongNode { sequence, node } => {
                write!(f, "entry {sequence} is of node {node:?}")
            }
            Self::CheckpointMismatch { sequence } => {
                write!(
                    f,
                    "the checkpoint for entry {sequence} vouches for another chain"
                )
            }
            Self::BadCheckpoint { sequence, reason } => {
                write!(
                    f,
                    "the checkpoint in entry {sequence} is not good: {reason}"
                )
            }
            Self::Truncated { last, expected } => write!(
                f,
                "the chain ends at entry {last}, but a checkpoint vouches for entry {expected}"
            ),
        }
    }
}

/// Verifies a node's whole chain. `latest` is the last checkpoint known from elsewhere, against
/// which a cut-off end is found; without it only entries before the last checkpoint in the chain
/// itself are known to be complete.
pub fn verify<'a>(
    node: &str,
    entries: impl IntoIterator<Item = &'a Entry>,
    trust: &Trust,
    latest: Option<&Checkpoint>,
    now_ms: i64,
) -> Report {
    let mut verifier = Verifier::new(
        node,
        Head::genesis(node),
        trust.clone(),
        latest.cloned(),
        now_ms,
    );
    for entry in entries {
        verifier.push(entry);
    }
    verifier.finish()
}

/// The same, entry by entry, from any head that is already trusted.
#[derive(Debug)]
pub struct Verifier {
    trust: Trust,
    latest: Option<Checkpoint>,
    now_ms: i64,
    head: Head,
    report: Report,
}

impl Verifier {
    pub fn new(
        node: &str,
        start: Head,
        trust: Trust,
        latest: Option<Checkpoint>,
        now_ms: i64,
    ) -> Self {
        let report = Report {
            node: node.to_owned(),
            entries: 0,
            last: start.sequence,
            checkpoints: 0,
            sealed: start.sequence,
            sealed_ms: 0,
            noted_gaps: 0,
            restarts: 0,
            lost: 0,
            problems: Vec::new(),
            more_problems: 0,
        };
        let mut verifier = Self {
            trust,
            latest: None,
            now_ms,
            head: start,
            report,
        };
        verifier.latest = latest.filter(|latest| verifier.accept_latest(latest));
        verifier.check_latest();
        verifier
    }

    pub fn push(&mut self, entry: &Entry) {
        self.report.entries += 1;
        let due = self.head.sequence + 1;
        if entry.sequence < due {
            let after = self.head.sequence;
            return self.problem(Problem::OutOfOrder {
                sequence: entry.sequence,
                after,
            });
        }
        if entry.sequence > due {
            self.problem(Problem::Gap {
                after: self.head.sequence,
                next: entry.sequence,
            });
        } else if self.head.next_hash(&entry.body) != entry.hash {
            self.problem(Problem::Changed {
                sequence: entry.sequence,
            });
        }
        let before = (entry.sequence == due).then_some(self.head);
        self.read(entry, before);
        self.head = entry.head();
        self.report.last = entry.sequence;
        self.check_latest();
    }

    pub fn finish(mut self) -> Report {
        if let Some(latest) = self
            .latest
            .take()
            .filter(|l| l.sequence > self.head.sequence)
        {
            let (last, expected) = (self.head.sequence, latest.sequence);
            self.problem(Problem::Truncated { last, expected });
        }
        self.report
    }

    fn read(&mut self, entry: &Entry, before: Option<Head>) {
        let sequence = entry.sequence;
        let record = match Record::decode(&entry.body) {
            Ok(record) => record,
            Err(error) => {
                return self.problem(Problem::Malformed {
                    sequence,
                    reason: error.to_string(),
                });
            }
        };
        if record.node != self.report.node {
            let node = record.node.chars().take(256).collect();
            self.problem(Problem::WrongNode { sequence, node });
        }
        match record.event {
            Event::Restart { .. } => self.report.restarts += 1,
            Event::Lost { .. } => self.report.lost += 1,
            Event::Gap { entries, .. } => {
                self.report.noted_gaps = self.report.noted_gaps.saturating_add(entries);
            }
            Event::Checkpoint(checkpoint) => self.read_checkpoint(sequence, &checkpoint, before),
            _ => {}
        }
    }

    fn read_checkpoint(&mut self, sequence: u64, checkpoint: &Checkpoint, before: Option<Head>) {
        self.report.checkpoints += 1;
        if let Err(error) = self.good(checkpoint) {
            return self.problem(Problem::BadCheckpoint {
                sequence,
                reason: error.to_string(),
            });
        }
        // After a gap the entry before is not there to compare with.
        if before.is_some() && checkpoint.head().ok() != before {
            return self.problem(Problem::CheckpointMismatch {
                sequence: checkpoint.sequence,
            });
        }
        self.report.sealed = checkpoint.sequence;
        self.report.sealed_ms = checkpoint.time_ms;
    }

    fn good(&self, checkpoint: &Checkpoint) -> Result<(), CheckpointError> {
        if checkpoint.node != self.report.node {
            return Err(CheckpointError::Malformed("it is another node's"));
        }
        checkpoint.verify(&self.trust, self.now_ms)
    }

    fn accept_latest(&mut self, latest: &Checkpoint) -> bool {
        match self.good(latest) {
            Ok(()) => true,
            Err(error) => {
                let (sequence, reason) = (latest.sequence, error.to_string());
                self.problem(Problem::BadCheckpoint { sequence, reason });
                false
            }
        }
    }

    fn check_latest(&mut self) {
        let Some(latest) = self
            .latest
            .as_ref()
            .filter(|l| l.sequence == self.head.sequence)
        else {
            return;
        };
        if latest.head().ok() == Some(self.head) {
            self.report.sealed = self.report.sealed.max(latest.sequence);
            self.report.sealed_ms = self.report.sealed_ms.max(latest.time_ms);
        } else {
            let sequence = latest.sequence;
            self.problem(Problem::CheckpointMismatch { sequence });
        }
    }

    fn problem(&mut self, problem: Problem) {
        if self.report.problems.len() < MAX_PROBLEMS {
            self.report.problems.push(problem);
        } else {
            self.report.more_problems += 1;
        }
    }
}
