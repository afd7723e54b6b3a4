//! The time that the pool counts in, and which boot it belongs to.

use std::{fs, io, time::Instant};

use turnpike_ipam::Moment;

/// Reads the kernel's boot clock once and counts on from there.
#[derive(Clone, Copy, Debug)]
pub struct Clock {
    start: Moment,
    at: Instant,
}

impl Clock {
    pub fn start() -> io::Result<Self> {
        let uptime = fs::read_to_string("/proc/uptime")?;
        let seconds: f64 = uptime
            .split(' ')
            .next()
            .and_then(|seconds| seconds.parse().ok())
            .ok_or_else(|| io::Error::other(format!("/proc/uptime says `{uptime}`")))?;
        // Positive and far below 2^53.
        let start = Moment((seconds * 1000.0) as u64);
        Ok(Self {
            start,
            at: Instant::now(),
        })
    }

    pub fn now(&self) -> Moment {
        self.start + self.at.elapsed()
    }
}

/// Changes when the machine restarts, and only then.
pub fn boot_id() -> io::Result<String> {
    Ok(fs::read_to_string("/proc/sys/kernel/random/boot_id")?
        .trim()
        .to_owned())
}
