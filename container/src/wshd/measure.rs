//! Measures that a test can leave out, one by one, to see that its attack then succeeds
//! (container/tests/escapes.rs). A build without debug assertions, as the helpers are, leaves out nothing,
//! whatever its arguments say.

/// One measure of the wall.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Measure {
    /// The container's users are strangers on the host.
    Users,
    /// What the kernel counts for a user namespace, or writes to an overlay, is on its own account.
    Account,
    /// The list of system calls.
    Filter,
    /// `no_new_privs`.
    NoNewPrivileges,
    /// The few capabilities of root, and none for others.
    Capabilities,
    /// A job can never get more capabilities than it has.
    Bounding,
    /// A job has the groups of its user, and no others.
    Groups,
    /// Its group is its user's.
    GroupId,
    /// It is its user's.
    UserId,
    /// What has kept a right that it should have dropped is not executed.
    SecondLook,
    /// A container has numbers for its own processes, and for no others.
    PidNamespace,
    /// Its control groups are the roots of all that it sees.
    CgroupNamespace,
    /// Mounts are told of to nobody, and heard of from nobody.
    PrivateMounts,
    /// Nothing on the root file system makes a program another user's.
    NoSetuid,
    /// No file on the root file system is a device.
    NoDevices,
    /// What the root file system calls a path leads nowhere but into it.
    InsideRoot,
    /// Where the kernel's file systems are mounted is no symlink.
    NoSymlinks,
    /// What says too much of the host is hidden.
    Masks,
    /// What does too much to the host cannot be written.
    WriteProtection,
    /// The keys of who started us are left behind.
    Keyring,
    /// The init has the descriptors that it was given on purpose.
    InitDescriptors,
    /// A job has its three descriptors.
    JobDescriptors,
    /// A working directory is inside the root.
    Directory,
    /// `/etc/passwd` and `/etc/group` are files, and not too long.
    PlainFiles,
    /// The neighbours on its link are told to the kernel, which looks for no others.
    Neighbours,
}

impl Measure {
    /// Whether it is taken: always, but for an argument `--without=…` of a debug build.
    pub(super) fn holds(self) -> bool {
        let without = match self {
            Self::Users => "--without=users",
            Self::Account => "--without=account",
            Self::Filter => "--without=filter",
            Self::NoNewPrivileges => "--without=no-new-privileges",
            Self::Capabilities => "--without=capabilities",
            Self::Bounding => "--without=bounding-set",
            Self::Groups => "--without=groups",
            Self::GroupId => "--without=group-id",
            Self::UserId => "--without=user-id",
            Self::SecondLook => "--without=second-look",
            Self::PidNamespace => "--without=pid-namespace",
            Self::CgroupNamespace => "--without=cgroup-namespace",
            Self::PrivateMounts => "--without=private-mounts",
            Self::NoSetuid => "--without=no-setuid",
            Self::NoDevices => "--without=no-devices",
            Self::InsideRoot => "--without=inside-root",
            Self::NoSymlinks => "--without=no-symlinks",
            Self::Masks => "--without=masks",
            Self::WriteProtection => "--without=write-protection",
            Self::Keyring => "--without=keyring",
            Self::InitDescriptors => "--without=init-descriptors",
            Self::JobDescriptors => "--without=job-descriptors",
            Self::Directory => "--without=directory",
            Self::PlainFiles => "--without=plain-files",
            Self::Neighbours => "--without=neighbours",
        };
        !cfg!(debug_assertions) || std::env::args_os().all(|argument| argument != without)
    }
}
