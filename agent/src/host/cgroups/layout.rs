//! Where groups go: which controller lives in which hierarchy of this host.
//!
//! Decided per controller, since a host may be hybrid: a v2 mount can stand beside v1 hierarchies and
//! hold no controller at all. Pure: what is mounted comes in as text.

use super::CgroupError;
use std::path::{Path, PathBuf};

/// The v2 controllers that Ostler uses, as they are spelt in `cgroup.subtree_control`.
pub(super) const WANTED: [&str; 3] = ["memory", "cpu", "pids"];

/// The two generations of control groups; they differ in nearly every file name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Version {
    /// A hierarchy for each controller.
    V1,
    /// One for all.
    V2,
}

impl std::fmt::Display for Version {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::V1 => "v1",
            Self::V2 => "v2",
        })
    }
}

/// What binds containers, by the kernel's name, and the generation that has it here.
pub type Controller = (&'static str, Option<Version>);

/// A mounted hierarchy.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Place {
    pub(super) version: Version,
    /// The mount point: the visible root of the hierarchy.
    pub(super) mount: PathBuf,
}

/// The place of each controller on this host, and the group below which ours are made.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Layout {
    /// The parent of all our groups, relative to each mount point.
    pub(super) parent: PathBuf,
    pub(super) memory: Place,
    pub(super) cpu: Place,
    pub(super) pids: Place,
    /// v1 only: v2 counts time in every group.
    pub(super) cpuacct: Option<Place>,
    /// v1: files. v2, where there are none: a filter, which needs no controller.
    pub(super) devices: Place,
    /// v1 only: v2 can freeze every group.
    pub(super) freezer: Option<Place>,
    /// v2, if a group is to be made there.
    pub(super) unified: Option<Place>,
}

impl Layout {
    /// Decides from the text of `/proc/self/mountinfo` (proc(5)) and, for a v2 mount point, of its
    /// `cgroup.controllers`.
    ///
    /// v2 is used if it holds a controller that we use, is the only hierarchy, or is all that can confine
    /// devices.
    ///
    /// # Errors
    /// [`CgroupError::NoMemory`] if the memory controller is mounted nowhere, or only read-only:
    /// without it no promise about memory can be kept. [`CgroupError::NoCpu`], [`CgroupError::NoPids`] and
    /// [`CgroupError::NoDevices`] likewise.
    pub(super) fn decide(
        parent: &Path,
        mountinfo: &str,
        controllers: impl Fn(&Path) -> String,
    ) -> Result<Self, CgroupError> {
        let mounts: Vec<Mount> = mountinfo.lines().filter_map(Mount::parse).collect();
        let v1 = |controller: &str| {
            let mount = mounts.iter().find(|mount| mount.is_v1_with(controller))?;
            Some(Place {
                version: Version::V1,
                mount: mount.point.clone(),
            })
        };
        let v2 = mounts.iter().find(|mount| mount.is_v2());
        let in_v2 = v2
            .map(|mount| controllers(&mount.point))
            .unwrap_or_default();
        let unified = || {
            v2.map(|mount| Place {
                version: Version::V2,
                mount: mount.point.clone(),
            })
        };
        let place = |controller: &str| {
            if in_v2
                .split_ascii_whitespace()
                .any(|name| name == controller)
            {
                unified()
            } else {
                v1(controller)
            }
        };
        let memory = place("memory").ok_or(CgroupError::NoMemory)?;
        let pids = place("pids").ok_or(CgroupError::NoPids)?;
        let cpu = place("cpu").ok_or(CgroupError::NoCpu)?;
        let devices = v1("devices")
            .or_else(unified)
            .ok_or(CgroupError::NoDevices)?;
        let unified = [&memory, &cpu, &pids, &devices]
            .into_iter()
            .find(|place| place.version == Version::V2)
            .cloned();
        Ok(Self {
            parent: parent.to_owned(),
            memory,
            cpu,
            pids,
            cpuacct: v1("cpuacct"),
            devices,
            freezer: v1("freezer"),
            unified,
        })
    }

    /// Every hierarchy in which a container has a group, each once: `cpu` and `cpuacct` are often
    /// one. v1 first.
    pub(super) fn places(&self) -> Vec<&Place> {
        let all = [
            Some(&self.memory),
            Some(&self.cpu),
            self.cpuacct.as_ref(),
            Some(&self.pids),
            Some(&self.devices),
            self.freezer.as_ref(),
            self.unified.as_ref(),
        ];
        let mut places: Vec<&Place> = Vec::new();
        for place in all.into_iter().flatten() {
            if !places.contains(&place) {
                places.push(place);
            }
        }
        places.sort_by_key(|place| place.version == Version::V2);
        places
    }

    /// What binds containers, and by which generation.
    pub(super) fn controllers(&self) -> [Controller; 5] {
        [
            ("memory", Some(&self.memory)),
            ("cpu", Some(&self.cpu)),
            ("pids", Some(&self.pids)),
            ("devices", Some(&self.devices)),
            ("freezer", self.freezer.as_ref().or(self.unified.as_ref())),
        ]
        .map(|(name, place)| (name, place.map(|place| place.version)))
    }

    /// One line for a person: `memory v1, cpu v1, pids v2, freezer absent, …`.
    pub(super) fn describe(&self) -> String {
        let words = self.controllers().map(|(name, version)| match version {
            Some(version) => format!("{name} {version}"),
            None => format!("{name} absent"),
        });
        words.join(", ")
    }
}

/// What to write to `cgroup.subtree_control` so that children get the controllers that we use:
/// `+memory +pids`, or `None` if they have them. Only what the group itself has can be handed on.
pub(super) fn to_enable(available: &str, enabled: &str) -> Option<String> {
    let has = |list: &str, name: &str| list.split_ascii_whitespace().any(|one| one == name);
    let missing: Vec<String> = WANTED
        .iter()
        .filter(|name| has(available, name) && !has(enabled, name))
        .map(|name| format!("+{name}"))
        .collect();
    (!missing.is_empty()).then(|| missing.join(" "))
}

/// A writable line of mountinfo.
struct Mount {
    point: PathBuf,
    kind: String,
    options: String,
}

impl Mount {
    /// `36 35 98:0 /root /mount/point rw,… [tag:value …] - fstype source rw,super,options`
    fn parse(line: &str) -> Option<Self> {
        let (left, right) = line.split_once(" - ")?;
        let mut left = left.split(' ').skip(4);
        let point = unescape(left.next()?);
        let writable = left.next()?.split(',').any(|option| option == "rw");
        let mut right = right.split(' ');
        let kind = right.next()?.to_owned();
        let options = right.nth(1)?.to_owned();
        writable.then_some(Self {
            point,
            kind,
            options,
        })
    }

    fn is_v1_with(&self, controller: &str) -> bool {
        self.kind == "cgroup" && self.options.split(',').any(|option| option == controller)
    }

    fn is_v2(&self) -> bool {
        self.kind == "cgroup2"
    }
}

/// Undoes the escapes of mountinfo: space, tab, newline and backslash come as three octal digits.
fn unescape(field: &str) -> PathBuf {
    let escapes = [
        ("\\040", " "),
        ("\\011", "\t"),
        ("\\012", "\n"),
        ("\\134", "\\"),
    ];
    PathBuf::from(
        escapes
            .iter()
            .fold(field.to_owned(), |text, (from, to)| text.replace(from, to)),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    const V1: &str = "\
31 24 0:26 / /sys/fs/cgroup ro,nosuid - tmpfs tmpfs ro,mode=755
32 31 0:27 / /sys/fs/cgroup/unified rw,nosuid shared:9 - cgroup2 cgroup2 rw,nsdelegate
33 31 0:28 / /sys/fs/cgroup/cpu,cpuacct rw,nosuid shared:10 - cgroup cgroup rw,cpu,cpuacct
34 31 0:29 / /sys/fs/cgroup/memory rw shared:11 master:2 - cgroup cgroup rw,memory
35 31 0:30 / /sys/fs/cgroup/systemd rw - cgroup cgroup rw,xattr,name=systemd
36 31 0:31 / /sys/fs/cgroup/pids rw - cgroup cgroup rw,pids
37 31 0:32 / /a\\040b/devices rw - cgroup cgroup rw,devices
38 31 0:33 / /sys/fs/cgroup/freezer ro - cgroup cgroup rw,freezer
";

    fn decide(mountinfo: &str, controllers: &str) -> Result<Layout, CgroupError> {
        Layout::decide(Path::new("ostler"), mountinfo, |_| controllers.to_owned())
    }

    fn mounts(layout: &Layout) -> Vec<&str> {
        layout
            .places()
            .into_iter()
            .filter_map(|place| place.mount.to_str())
            .collect()
    }

    #[test]
    fn a_v2_mount_without_our_controllers_is_left_alone() {
        let layout = decide(V1, "hugetlb\n").unwrap();
        assert_eq!(
            mounts(&layout),
            [
                "/sys/fs/cgroup/memory",
                "/sys/fs/cgroup/cpu,cpuacct",
                "/sys/fs/cgroup/pids",
                "/a b/devices"
            ]
        );
        assert_eq!(
            layout.describe(),
            "memory v1, cpu v1, pids v1, devices v1, freezer absent"
        );
    }

    #[test]
    fn a_hybrid_host_is_decided_per_controller() {
        let without_pids = V1.replace("rw,pids", "rw,misc");
        let layout = decide(&without_pids, "hugetlb pids\n").unwrap();
        assert_eq!(
            mounts(&layout).last(),
            Some(&"/sys/fs/cgroup/unified"),
            "v2 comes last"
        );
        assert_eq!(
            layout.describe(),
            "memory v1, cpu v1, pids v2, devices v1, freezer v2"
        );
    }

    #[test]
    fn devices_are_confined_by_v2_only_where_v1_cannot() {
        let without = V1.replace("rw,devices", "rw,misc");
        let layout = decide(&without, "hugetlb\n").unwrap();
        assert_eq!(mounts(&layout).last(), Some(&"/sys/fs/cgroup/unified"));
        assert_eq!(
            layout.describe(),
            "memory v1, cpu v1, pids v1, devices v2, freezer v2"
        );
        let neither = without.replace("cgroup2", "tmpfs");
        assert!(matches!(decide(&neither, ""), Err(CgroupError::NoDevices)));
    }

    #[test]
    fn a_pure_v2_host_has_one_group_per_container() {
        let mountinfo = "25 1 0:22 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw,nsdelegate\n";
        let layout = decide(mountinfo, "cpuset cpu io memory hugetlb pids rdma misc\n").unwrap();
        assert_eq!(mounts(&layout), ["/sys/fs/cgroup"]);
        assert_eq!(
            layout.describe(),
            "memory v2, cpu v2, pids v2, devices v2, freezer v2"
        );
    }

    #[test]
    fn a_host_without_a_writable_memory_controller_is_refused() {
        let v2 = "25 1 0:22 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n";
        let read_only = "25 1 0:22 / /sys/fs/cgroup ro - cgroup2 cgroup2 rw\n";
        for (mountinfo, controllers) in [
            ("", ""),
            ("no mountinfo at all\n1 2 3 - \n", ""),
            (v2, "cpu pids"),
            (read_only, "memory"),
        ] {
            let refused = decide(mountinfo, controllers);
            assert!(matches!(refused, Err(CgroupError::NoMemory)), "{mountinfo}");
        }
    }

    #[test]
    fn a_host_that_cannot_count_processes_or_share_its_processors_is_refused() {
        let without = V1.replace("rw,pids", "rw,misc");
        assert!(matches!(
            decide(&without, "hugetlb\n"),
            Err(CgroupError::NoPids)
        ));
        let without = V1.replace("rw,cpu,cpuacct", "rw,cpuacct");
        assert!(matches!(
            decide(&without, "hugetlb\n"),
            Err(CgroupError::NoCpu)
        ));
    }

    #[test]
    fn only_what_is_missing_is_enabled() {
        let all = "cpuset cpu io memory pids";
        assert_eq!(to_enable(all, ""), Some("+memory +cpu +pids".into()));
        assert_eq!(to_enable(all, "cpu io\n"), Some("+memory +pids".into()));
        assert_eq!(to_enable("hugetlb pids", ""), Some("+pids".into()));
        assert_eq!(to_enable(all, "memory pids cpu"), None);
        assert_eq!(
            to_enable("cpuset", ""),
            None,
            "`cpu` is not the start of a name"
        );
    }
}
