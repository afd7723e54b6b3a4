//! One report for many packets.

use std::collections::HashMap;

use super::packet::Flow;

/// Flows watched at a time. When as many are, each packet of a further one is reported by itself:
/// the rules' own rate limit bounds that.
const WATCHED: usize = 1024;

/// Packets that followed a reported one, by flow.
#[derive(Debug, Default)]
pub(super) struct Merge {
    repeated: HashMap<Flow, u64>,
}

impl Merge {
    /// True: to be reported now. False: it will be in the next sweep's count.
    pub(super) fn is_first(&mut self, flow: &Flow) -> bool {
        if let Some(count) = self.repeated.get_mut(flow) {
            *count += 1;
            return false;
        }
        if self.repeated.len() < WATCHED {
            self.repeated.insert(*flow, 0);
        }
        true
    }

    /// What was repeated since the last sweep. A flow that was not is watched no longer.
    pub(super) fn sweep(&mut self) -> Vec<(Flow, u64)> {
        self.repeated.retain(|_, count| *count > 0);
        self.repeated
            .iter_mut()
            .map(|(flow, count)| (*flow, std::mem::take(count)))
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Cause;

    fn flow(port: u16) -> Flow {
        Flow {
            source: [10, 0, 1, 5].into(),
            destination: [203, 0, 113, 66].into(),
            protocol: 17,
            source_port: port,
            destination_port: 53,
            index: 7,
            ethertype: 0x0800,
            cause: Cause::Refused,
        }
    }

    #[test]
    fn the_first_is_told_at_once_and_the_others_together() {
        let mut merge = Merge::default();
        assert!(merge.is_first(&flow(1)));
        assert!(!merge.is_first(&flow(1)));
        assert!(!merge.is_first(&flow(1)));
        assert!(merge.is_first(&flow(2)));
        assert_eq!(merge.sweep(), [(flow(1), 2)]);
        assert!(
            !merge.is_first(&flow(1)),
            "still watched after a repetition"
        );
        assert!(merge.is_first(&flow(2)), "forgotten after a quiet second");
        assert_eq!(merge.sweep(), [(flow(1), 1)]);
        assert!(merge.sweep().is_empty());
    }

    #[test]
    fn the_table_is_bounded_and_nothing_is_lost() {
        let mut merge = Merge::default();
        for port in 0..3000 {
            assert!(merge.is_first(&flow(port)));
        }
        assert!(
            merge.is_first(&flow(2999)),
            "not watched, so told each time"
        );
        assert_eq!(merge.repeated.len(), WATCHED);
    }
}
