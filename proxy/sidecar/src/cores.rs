//! How many processors this process may keep busy, by its container's CPU limit.

use std::{fs, path::Path};

/// The limit in whole processors, rounded up: half a processor more is worth a thread more. `None`
/// where there is no limit, or none can be read.
pub fn limit() -> Option<usize> {
    let groups = fs::read_to_string("/proc/self/cgroup").ok()?;
    limit_in(Path::new("/sys/fs/cgroup"), &groups)
}

/// `groups` is the content of `/proc/self/cgroup`: lines of `number:controllers:path`, where number
/// 0 without controllers is version 2.
/// Source: <https://man7.org/linux/man-pages/man7/cgroups.7.html>.
fn limit_in(mount: &Path, groups: &str) -> Option<usize> {
    let lines = groups.lines().filter_map(|line| {
        let (_, rest) = line.split_once(':')?;
        rest.split_once(':')
    });
    let limits = lines.filter_map(|(controllers, path)| {
        if controllers.is_empty() {
            least(mount, path, unified)
        } else if controllers.split(',').any(|each| each == "cpu") {
            let split = mount.join("cpu");
            let joined = mount.join(controllers);
            least(if split.exists() { &split } else { &joined }, path, legacy)
        } else {
            None
        }
    });
    limits.min()
}

/// The least of a group and those it is in. A container sees its own group as the mount's root,
/// whatever path it is told.
fn least(mount: &Path, path: &str, read: fn(&Path) -> Option<usize>) -> Option<usize> {
    // A group outside of what is mounted is told with `..`.
    let path = if path.contains("..") { "" } else { path };
    let inner = mount.join(path.trim_start_matches('/'));
    let groups = inner.ancestors().take_while(|at| at.starts_with(mount));
    groups.filter_map(read).min()
}

/// `cpu.max`: `quota period`, or `max period`.
fn unified(group: &Path) -> Option<usize> {
    let text = fs::read_to_string(group.join("cpu.max")).ok()?;
    let (quota, period) = text.trim().split_once(' ')?;
    processors(quota, period)
}

/// A quota of -1 is none.
fn legacy(group: &Path) -> Option<usize> {
    let read = |file: &str| fs::read_to_string(group.join(file)).ok();
    processors(
        read("cpu.cfs_quota_us")?.trim(),
        read("cpu.cfs_period_us")?.trim(),
    )
}

fn processors(quota: &str, period: &str) -> Option<usize> {
    let (quota, period): (usize, usize) = (quota.parse().ok()?, period.parse().ok()?);
    (period > 0).then(|| quota.div_ceil(period).max(1))
}

#[cfg(test)]
mod tests {
    use super::*;

    const V2: &str = "0::/kubepods/pod1\n";
    const V1: &str = "4:memory:/kubepods/pod1\n3:cpu,cpuacct:/kubepods/pod1\n0::/\n";

    fn found(groups: &str, files: &[(&str, &str)]) -> Option<usize> {
        let mount = tempfile::tempdir().unwrap();
        for (path, text) in files {
            let path = mount.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
        limit_in(mount.path(), groups)
    }

    #[test]
    fn a_limit_is_rounded_up() {
        for (max, expected) in [
            ("max 100000", None),
            ("20000 100000", Some(1)),
            ("100000 100000", Some(1)),
            ("100001 100000", Some(2)),
            ("250000 100000", Some(3)),
            ("0 100000", Some(1)),
            ("1000 0", None),
            ("garbage", None),
            ("", None),
        ] {
            let files = [("kubepods/pod1/cpu.max", max)];
            assert_eq!(found(V2, &files), expected, "{max}");
        }
    }

    #[test]
    fn the_least_on_the_way_up_holds() {
        let files = [
            ("cpu.max", "max 100000\n"),
            ("kubepods/cpu.max", "150000 100000\n"),
            ("kubepods/pod1/cpu.max", "400000 100000\n"),
        ];
        assert_eq!(found(V2, &files), Some(2));
        // As a container sees it: its own group is the root.
        assert_eq!(found(V2, &[("cpu.max", "300000 100000\n")]), Some(3));
        assert_eq!(
            found("0::/../../outside\n", &[("cpu.max", "300000 100000")]),
            Some(3)
        );
    }

    #[test]
    fn the_older_version_is_read_too() {
        let quota = |quota: &'static str| {
            [
                ("cpu/kubepods/pod1/cpu.cfs_quota_us", quota),
                ("cpu/kubepods/pod1/cpu.cfs_period_us", "100000\n"),
            ]
        };
        assert_eq!(found(V1, &quota("150000\n")), Some(2));
        assert_eq!(found(V1, &quota("-1\n")), None);
        let joined = [
            ("cpu,cpuacct/cpu.cfs_quota_us", "200000\n"),
            ("cpu,cpuacct/cpu.cfs_period_us", "100000\n"),
        ];
        assert_eq!(found(V1, &joined), Some(2), "a container's own root");
        assert_eq!(found("", &[]), None);
    }
}
