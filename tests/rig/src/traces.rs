//! What a world leaves on a machine: looked for before and after, so that nothing stays unseen.

use std::{collections::BTreeSet, fs, path::PathBuf, process::Command, time::Duration};

use crate::{wait_for, world::folder_of};

/// How long what other programs do at the same time may look like ours.
const SETTLE: Duration = Duration::from_secs(5);

/// Everything of this machine that a world might leave behind, a line each.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Traces {
    name: String,
    seen: BTreeSet<String>,
}

impl Traces {
    /// What is there now. What can bear a world's name (namespaces, mounts, processes, control groups, files) is
    /// looked for by it, the rest (links, rules) whole.
    pub fn of(name: &str) -> Self {
        let rules = output("nft", &["--stateless", "list", "ruleset"]) + &output("ip", &["rule"]);
        let named = [
            ("namespace", list("/run/netns")),
            ("mount", lines(&read("/proc/self/mounts"))),
            ("process", processes()),
            ("control group", groups()),
        ];
        let whole = [("link", list("/sys/class/net")), ("rule", lines(&rules))];
        let of = |kind: &str, all: Vec<String>| -> Vec<String> {
            all.iter().map(|each| format!("{kind} {each}")).collect()
        };
        let mut seen: BTreeSet<String> = named
            .into_iter()
            .flat_map(|(kind, all)| of(kind, all))
            .filter(|line| line.contains(name))
            .collect();
        seen.extend(whole.into_iter().flat_map(|(kind, all)| of(kind, all)));
        let folder = folder_of(name);
        if folder.exists() {
            seen.insert(format!("folder {}", folder.display()));
        }
        Self {
            name: name.to_owned(),
            seen,
        }
    }

    /// What is there now and was not then. What another program does in passing is gone when it is
    /// looked for again; what a world left stays.
    pub fn added_since(&self) -> BTreeSet<String> {
        let added = || -> BTreeSet<String> {
            let now = Self::of(&self.name).seen;
            now.difference(&self.seen).cloned().collect()
        };
        match wait_for(SETTLE, || added().is_empty().then_some(())) {
            Some(()) => BTreeSet::new(),
            None => added(),
        }
    }
}

/// Every control group of every hierarchy.
fn groups() -> Vec<String> {
    let mut found = Vec::new();
    let mut open = vec![PathBuf::from("/sys/fs/cgroup")];
    while let Some(folder) = open.pop() {
        let entries = fs::read_dir(&folder).into_iter().flatten().flatten();
        let folders = entries.filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()));
        open.extend(folders.map(|entry| entry.path()));
        found.push(folder.display().to_string());
    }
    found
}

fn list(folder: &str) -> Vec<String> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    entries
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .collect()
}

fn lines(text: &str) -> Vec<String> {
    text.lines().map(str::to_owned).collect()
}

fn read(path: &str) -> String {
    fs::read_to_string(path).unwrap_or_default()
}

/// Every process but this one: its command line, and where its output goes, which for all of a
/// world's is a file in its folder.
fn processes() -> Vec<String> {
    let own = std::process::id().to_string();
    let others = list("/proc").into_iter().filter(|pid| *pid != own);
    let is_pid = |pid: &String| pid.bytes().all(|letter| letter.is_ascii_digit());
    let line = |pid: String| {
        let words = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        let output = [1, 2].map(|fd| {
            let file = fs::read_link(format!("/proc/{pid}/fd/{fd}")).unwrap_or_default();
            file.display().to_string()
        });
        let words = String::from_utf8_lossy(&words).replace('\0', " ");
        format!("{pid} {words}> {}", output.join(" "))
    };
    others.filter(is_pid).map(line).collect()
}

fn output(program: &str, arguments: &[&str]) -> String {
    let output = Command::new(program).args(arguments).output();
    output.map_or_else(
        |error| format!("{program}: {error}"),
        |output| String::from_utf8_lossy(&output.stdout).into_owned(),
    )
}
