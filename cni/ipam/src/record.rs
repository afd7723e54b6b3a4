//! The journal's lines: what happened to the pool, one record each, guarded by a checksum.
//!
//! A line is `CRC32C(8 hex digits) SPACE JSON NEWLINE`: people can read it and `grep` it.

use std::net::Ipv4Addr;

use crc::{CRC_32_ISCSI, Crc};
use serde::{Deserialize, Serialize};

use crate::{Attachment, Eni, EniId, Intent, IntentId, Lease, Moment};

const CRC: Crc<u32> = Crc::<u32>::new(&CRC_32_ISCSI);

/// A fact about the pool. The pool is the fold of all of them in order.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "is", rename_all = "snake_case")]
pub enum Record {
    /// Times from here on count from this start of the machine.
    Boot {
        id: String,
        at: Moment,
    },
    /// The interface is attached and ours.
    Eni {
        eni: Eni,
        at: Moment,
    },
    EniGone {
        eni: EniId,
    },
    /// EC2 assigned these; free for pods.
    Gained {
        eni: EniId,
        addresses: Vec<Ipv4Addr>,
        at: Moment,
    },
    /// EC2 lists these on our interface and we do not know why: not for pods before `until`.
    Quarantined {
        eni: EniId,
        addresses: Vec<Ipv4Addr>,
        until: Moment,
    },
    /// EC2 does not hold these for us any more.
    Lost {
        eni: EniId,
        addresses: Vec<Ipv4Addr>,
    },
    Leased {
        lease: Lease,
    },
    /// Replaces the lease's note.
    Noted {
        attachment: Attachment,
        note: String,
    },
    /// The pod is gone, its address cools.
    Freed {
        attachment: Attachment,
        address: Ipv4Addr,
        until: Moment,
    },
    /// The ADD failed before the address was used.
    Undone {
        attachment: Attachment,
    },
    /// Announces a call to EC2.
    Intended {
        intent: Intent,
    },
    /// The call's outcome is known, and on record before this line.
    Settled {
        id: IntentId,
    },
}

/// Appends the record's line.
pub fn encode(record: &Record, out: &mut Vec<u8>) {
    let json = serde_json::to_string(record).expect("a record holds only plain data");
    let line = format!("{:08x} {json}\n", CRC.checksum(json.as_bytes()));
    out.extend_from_slice(line.as_bytes());
}

/// What followed the last whole record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tail {
    Clean,
    /// The last write did not finish. Nothing acknowledged is in it.
    Torn,
    /// Whole records follow the broken one: the disk or somebody changed what had been committed.
    Damaged,
}

/// The records up to the first line that is not whole, the bytes they take, and what follows.
pub fn decode(bytes: &[u8]) -> (Vec<Record>, usize, Tail) {
    let mut records = Vec::new();
    let mut end = 0;
    for line in bytes.split_inclusive(|byte| *byte == b'\n') {
        let Some(record) = decode_line(line) else {
            break;
        };
        records.push(record);
        end += line.len();
    }
    let rest = &bytes[end..];
    let later_is_whole = || {
        rest.split_inclusive(|byte| *byte == b'\n')
            .skip(1)
            .any(|l| decode_line(l).is_some())
    };
    let tail = match rest {
        [] => Tail::Clean,
        _ if later_is_whole() => Tail::Damaged,
        _ => Tail::Torn,
    };
    (records, end, tail)
}

fn decode_line(line: &[u8]) -> Option<Record> {
    let line = std::str::from_utf8(line.strip_suffix(b"\n")?).ok()?;
    let (sum, json) = line.split_once(' ')?;
    if sum != format!("{:08x}", CRC.checksum(json.as_bytes())) {
        return None;
    }
    serde_json::from_str(json).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn boot(n: u64) -> Record {
        Record::Boot {
            id: format!("boot-{n}"),
            at: Moment(n),
        }
    }

    fn lines(n: u64) -> Vec<u8> {
        let mut bytes = Vec::new();
        (0..n).for_each(|n| encode(&boot(n), &mut bytes));
        bytes
    }

    #[test]
    fn every_cut_yields_exactly_the_whole_records_before_it() {
        let bytes = lines(3);
        let one = bytes.len() / 3;
        for cut in 0..=bytes.len() {
            let (records, end, tail) = decode(&bytes[..cut]);
            assert_eq!(records.len(), cut / one, "cut at {cut}");
            assert_eq!(end, records.len() * one);
            assert_eq!(
                tail,
                if cut % one == 0 {
                    Tail::Clean
                } else {
                    Tail::Torn
                }
            );
        }
    }

    #[test]
    fn a_changed_byte_is_never_read_as_a_record() {
        let bytes = lines(3);
        let one = bytes.len() / 3;
        for at in 0..one {
            let mut changed = bytes.clone();
            changed[at] ^= 0x20;
            let (records, _, tail) = decode(&changed);
            assert_eq!(records, [], "byte {at}");
            assert_eq!(tail, Tail::Damaged);
        }
    }

    #[test]
    fn zeroes_after_a_crash_are_a_torn_tail() {
        let mut bytes = lines(2);
        bytes.extend([0; 4096]);
        assert_eq!(decode(&bytes).2, Tail::Torn);
    }
}
