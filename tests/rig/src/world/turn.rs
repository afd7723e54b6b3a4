//! Whose turn it is to have a world on this machine.

use std::{
    fs,
    sync::{Mutex, MutexGuard, PoisonError},
};

use anyhow::Result;

use super::ROOT;

/// Two cores cannot carry two worlds at once without one starving the other.
static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

/// One world at a time: in this process, and among all processes of the machine.
#[derive(Debug)]
pub struct Turn {
    _process: MutexGuard<'static, ()>,
    /// Let go with the file, also by a crash.
    _machine: fs::File,
}

impl Turn {
    pub fn wait(progress: &dyn Fn(&str)) -> Result<Self> {
        let process = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
        fs::create_dir_all(ROOT)?;
        let machine = fs::File::open(ROOT)?;
        if let Err(fs::TryLockError::WouldBlock) = machine.try_lock() {
            progress("waiting: another world is being shown or tested on this machine");
            machine.lock()?;
        }
        Ok(Self {
            _process: process,
            _machine: machine,
        })
    }
}
