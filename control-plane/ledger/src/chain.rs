//! The hash chain.
//!
//! `hash(0) = SHA-256("turnpike ledger v1\0" node)`, so that no two nodes' chains have an entry in
//! common; `hash(n) = SHA-256(hash(n-1) n body)` with `n` as eight bytes, big end first.

use sha2::{Digest, Sha256};

pub type Hash = [u8; 32];

/// One line of the chain, as it is stored and sent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    pub sequence: u64,
    /// A [`Record`](crate::Record) in its canonical encoding.
    pub body: Vec<u8>,
    pub hash: Hash,
}

impl Entry {
    /// Where the chain stands with this entry as its last.
    pub fn head(&self) -> Head {
        Head {
            sequence: self.sequence,
            hash: self.hash,
        }
    }
}

/// How far a chain has come: its last entry's sequence and hash.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Head {
    pub sequence: u64,
    pub hash: Hash,
}

impl Head {
    /// Before the first entry of `node`'s chain.
    pub fn genesis(node: &str) -> Self {
        let mut hasher = Sha256::new();
        hasher.update(b"turnpike ledger v1\0");
        hasher.update(node.as_bytes());
        Self {
            sequence: 0,
            hash: hasher.finalize().into(),
        }
    }

    /// The hash that the entry after this head must have.
    pub fn next_hash(&self, body: &[u8]) -> Hash {
        let mut hasher = Sha256::new();
        hasher.update(self.hash);
        hasher.update((self.sequence + 1).to_be_bytes());
        hasher.update(body);
        hasher.finalize().into()
    }
}

/// The writing end of a chain. Cloned before a batch and put back after its commit, so that what
/// failed to reach the disk has no place in the chain.
#[derive(Clone, Debug)]
pub struct Chain {
    head: Head,
}

impl Chain {
    pub fn begin(node: &str) -> Self {
        Self {
            head: Head::genesis(node),
        }
    }

    pub fn resume(head: Head) -> Self {
        Self { head }
    }

    pub fn head(&self) -> Head {
        self.head
    }

    pub fn append(&mut self, body: Vec<u8>) -> Entry {
        let hash = self.head.next_hash(&body);
        self.head = Head {
            sequence: self.head.sequence + 1,
            hash,
        };
        Entry {
            sequence: self.head.sequence,
            body,
            hash,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chains_of_two_nodes_share_nothing() {
        let (mut a, mut b) = (Chain::begin("node-a"), Chain::begin("node-b"));
        assert_ne!(
            a.append(b"same".to_vec()).hash,
            b.append(b"same".to_vec()).hash
        );
    }

    #[test]
    fn a_resumed_chain_continues_the_same() {
        let mut whole = Chain::begin("node-a");
        whole.append(b"one".to_vec());
        let mut resumed = Chain::resume(whole.head());
        assert_eq!(
            whole.append(b"two".to_vec()),
            resumed.append(b"two".to_vec())
        );
    }
}
