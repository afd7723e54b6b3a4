//! What the container runtime asks of the node.

use turnpike_ipam::{Attachment, Holder, PodRef};

use super::World;

impl World {
    pub(crate) fn add(&mut self) {
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
        let routed = self.routed.contains(&lease.eni);
        assert!(routed, "{} has no routes", lease.address);
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

    pub(crate) fn del(&mut self) {
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

    pub(crate) fn late_del(&mut self) {
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
}

pub(crate) fn holder(attachment: Attachment) -> Holder {
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
