//! What the wire carried: tcpdump at the fabric's router, and a search in what it wrote.

use std::{path::PathBuf, time::Duration};

use anyhow::{Context as _, Result};
use turnpike_vpc::netns::Command;

use crate::{daemon::Daemon, wait_for, world::World};

/// A capture in progress.
#[derive(Debug)]
pub struct Capture {
    tcpdump: Daemon,
    file: PathBuf,
}

/// Bytes of a finished capture, headers and payloads alike.
#[derive(Clone, Debug)]
pub struct Wire(Vec<u8>);

impl Capture {
    /// Captures every packet that crosses the router, in and out.
    pub fn start(world: &World) -> Result<Self> {
        let router = world.namespace("router")?;
        let folder = world.folder.join("capture");
        let _ = std::fs::remove_dir_all(&folder);
        std::fs::create_dir_all(&folder)?;
        let file = folder.join("wire.pcap");
        let command = Command::new("tcpdump")
            .args([
                "--immediate-mode",
                "-U",
                "-n",
                "-s",
                "0",
                "-i",
                "any",
                "-Z",
                "root",
                "-w",
            ])
            .arg(&file);
        let tcpdump = Daemon::start("tcpdump", command, &router, &folder, false)?;
        wait_for(Duration::from_secs(10), || {
            tcpdump.log().contains("listening").then_some(())
        })
        .with_context(|| format!("tcpdump did not begin: {}", tcpdump.log()))?;
        // It says so a moment before the first packet is really taken.
        std::thread::sleep(Duration::from_millis(200));
        Ok(Self { tcpdump, file })
    }

    pub fn finish(mut self) -> Result<Wire> {
        // What was sent last may still be on its way through the capture buffer.
        std::thread::sleep(Duration::from_millis(300));
        self.tcpdump.stop(Duration::from_secs(5))?;
        Ok(Wire(std::fs::read(&self.file)?))
    }
}

impl Wire {
    pub fn len(&self) -> usize {
        self.0.len()
    }

    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub fn carried(&self, text: &str) -> bool {
        self.0
            .windows(text.len())
            .any(|window| window == text.as_bytes())
    }
}
