//! What lets containers' packets pass, kept so whoever else changes the host's rules: our table with
//! the elements of what is attached, forwarding, and the accepts in others' chains.
//!
//! Everything here blocks: the kernel works off one transaction at a time, also others' large ones, and
//! programs are run where the table is loaded or looked at.

use super::decode::Chain;
use super::foreign::{self, Accepts};
use super::nfnetlink::{Element, Nftables};
use super::table::{self, Elements, HostAccess};
use super::watch::Changes;
use super::{Attached, Lease, NetworkError, program, sysctl};
use nix::errno::Errno;
use std::collections::{BTreeMap, BTreeSet};
use std::error::Error;
use std::sync::{Mutex, MutexGuard, PoisonError};
use tracing::{info, warn};

const FORWARDING: &str = "ipv4/ip_forward";
/// A chain without packets that says what `close` must put back, also if another agent closes. Beside
/// it are those for chains of others (`foreign::forwarders`) that were there when nothing was forwarded.
const FORWARDING_NOTE: &str = "ip_forward_was_off";

/// How often the table is loaded before it is left for a while: somebody else is at it.
const ROUNDS: usize = 3;

/// The table's text without its elements, and these.
type Listed = (String, BTreeSet<String>);

/// The keeper of the rules in the network namespace in which it was opened.
#[derive(Debug)]
pub(super) struct Rules {
    nftables: Nftables,
    host_access: HostAccess,
    shall: Mutex<Shall>,
    /// Of its own, because iptables waits for others, and containers shall not wait for it.
    accepts: Mutex<Accepts>,
}

/// What shall be so.
#[derive(Debug)]
struct Shall {
    /// By handle.
    attached: BTreeMap<String, Attached>,
    /// `Kept` until somebody has said what lives: a former agent's containers may.
    others: Elements,
    /// Chains that no packet passes: whether forwarding was off, and who did not mind.
    notes: BTreeSet<String>,
    /// How `nft` lists the table without elements. `None`: it was not loaded, or not seen whole since.
    listing: Option<String>,
    /// Nothing is mended any more.
    closed: bool,
}

impl Rules {
    /// Table first: without it nothing of a container's may be forwarded. Tells, too, whether all is so.
    pub(super) fn open(
        host_access: HostAccess,
        changes: &Changes,
    ) -> Result<(Self, bool), NetworkError> {
        let nftables = Nftables::open(table::TABLE)?;
        let chains = nftables.chains()?;
        let is_note = |chain: &&Chain| chain.is_in(table::TABLE) && !chain.is_base();
        let notes = chains.iter().filter(is_note);
        let mut notes: BTreeSet<_> = notes.map(|chain| chain.name.clone()).collect();
        if sysctl::read(FORWARDING)? == "0" && notes.insert(FORWARDING_NOTE.to_owned()) {
            let found = told(foreign::forwarders(&chains)).unwrap_or_default();
            notes.extend(
                found
                    .iter()
                    .map(|(name, rules)| foreign::note(name, *rules)),
            );
        }
        let rules = Self {
            nftables,
            host_access,
            shall: Mutex::new(Shall {
                attached: BTreeMap::new(),
                others: Elements::Kept,
                notes,
                listing: None,
                closed: false,
            }),
            accepts: Mutex::new(Accepts::WhereNeeded),
        };
        let table = rules.mend_table(&mut rules.shall(), changes)?;
        sysctl::write(FORWARDING, "1")?;
        let settled = rules.settle();
        Ok((rules, table && settled))
    }

    /// Makes everything so again, and touches nothing that is. Tells whether all is so.
    pub(super) fn mend(&self, changes: &Changes) -> bool {
        // Mostly all is so, and containers that come and go need not wait for `nft` to say it.
        let seen = listed();
        let mut shall = self.shall();
        if shall.closed {
            return true;
        }
        let table = || match is_so(&shall, seen)? {
            true => Ok(true),
            false => self.mend_table(&mut shall, changes),
        };
        let table = told(table());
        let forwarding = || {
            if sysctl::read(FORWARDING)? == "0" {
                warn!(
                    "forwarding was switched off by somebody and is switched on: containers need it"
                );
            }
            sysctl::write(FORWARDING, "1")
        };
        let forwarding = told(forwarding());
        drop(shall);
        let settled = self.settle();
        table == Some(true) && forwarding.is_some() && settled
    }

    /// Lets a container speak from its address.
    pub(super) fn attach(&self, handle: &str, lease: &Lease) -> Result<(), NetworkError> {
        let mut shall = self.shall();
        self.add(&mut shall, &table::source(handle, lease))?;
        let attached = Attached {
            handle: handle.to_owned(),
            lease: lease.clone(),
            ports: Vec::new(),
        };
        shall.attached.insert(handle.to_owned(), attached);
        Ok(())
    }

    /// Leads a port of the host (`outer`) to one of an attached container (`inner`).
    pub(super) fn map(
        &self,
        handle: &str,
        lease: &Lease,
        (outer, inner): (u16, u16),
    ) -> Result<(), NetworkError> {
        let mut shall = self.shall();
        // The caller may have gone away and a `detach` come before this.
        if !shall.attached.contains_key(handle) {
            return Err(NetworkError::Detached(handle.to_owned()));
        }
        self.add(&mut shall, &table::port(lease.container, outer, inner))?;
        if let Some(Attached { ports, .. }) = shall.attached.get_mut(handle)
            && !ports.contains(&(outer, inner))
        {
            ports.push((outer, inner));
        }
        Ok(())
    }

    /// Takes away what was added for a container; what is not there is no error. After one, the next
    /// mending finds what was left.
    pub(super) fn detach(
        &self,
        handle: &str,
        lease: &Lease,
        ports: &[(u16, u16)],
    ) -> Result<(), NetworkError> {
        let mut shall = self.shall();
        let known = shall.attached.remove(handle).map(|known| known.ports);
        // By host port, which alone says what goes.
        let all: BTreeMap<u16, u16> = known.into_iter().flatten().chain(ports.to_vec()).collect();
        let all = all.into_iter();
        let ports = all.map(|(outer, inner)| table::port(lease.container, outer, inner));
        let elements: Vec<_> = ports.chain([table::source(handle, lease)]).collect();
        self.nftables.remove(&elements)
    }

    /// Makes the table hold exactly these, in one transaction.
    pub(super) fn rebuild(&self, live: Vec<Attached>) -> Result<(), NetworkError> {
        let mut shall = self.shall();
        let live = live.into_iter();
        shall.attached = live.map(|one| (one.handle.clone(), one)).collect();
        shall.others = Elements::Removed;
        self.load(&mut shall)
    }

    /// Takes everything away and puts forwarding back. What is refused is logged.
    pub(super) fn close(&self) {
        *self.accepts.lock().unwrap_or_else(PoisonError::into_inner) = Accepts::Nowhere;
        self.settle();
        let mut shall = self.shall();
        shall.closed = true;
        if shall.notes.contains(FORWARDING_NOTE) {
            told(self.end_forwarding(&shall.notes));
        }
        told(self.nftables.remove_table());
    }

    /// Switches forwarding off, unless somebody has come who may need it.
    fn end_forwarding(&self, notes: &BTreeSet<String>) -> Result<(), NetworkError> {
        let now = foreign::forwarders(&self.nftables.chains()?)?;
        let new = now
            .iter()
            .filter(|(name, rules)| !foreign::is_noted(notes, name, **rules));
        let new: Vec<&str> = new.map(|(name, _)| name.as_str()).collect();
        if new.is_empty() {
            return sysctl::write(FORWARDING, "0");
        }
        let chains = new.join(", ");
        info!(
            chains,
            "forwarding was off before and stays on: others forward by now"
        );
        Ok(())
    }

    fn settle(&self) -> bool {
        let accepts = self.accepts.lock().unwrap_or_else(PoisonError::into_inner);
        foreign::settle(*accepts)
    }

    /// Adds an element; where the table is gone, with it.
    fn add(&self, shall: &mut Shall, element: &Element) -> Result<(), NetworkError> {
        let added = self.nftables.add(std::slice::from_ref(element));
        match added {
            Err(NetworkError::Table {
                errno: Errno::ENOENT,
                ..
            }) if !shall.closed => {
                warn!("the nftables table was removed by somebody and is loaded again");
                self.load(shall)?;
                self.nftables.add(std::slice::from_ref(element))
            }
            other => other,
        }
    }

    /// Tells whether the table is so: somebody else may be at it all the time.
    fn mend_table(&self, shall: &mut Shall, changes: &Changes) -> Result<bool, NetworkError> {
        for round in 0..=ROUNDS {
            // What the look below sees is no news afterwards, what we do ourselves neither.
            changes.drain();
            if is_so(shall, listed())? {
                return Ok(true);
            }
            if round == ROUNDS {
                break;
            }
            if shall.listing.is_some() {
                warn!("the nftables table was changed by somebody and is loaded again");
            }
            // Where it is known what lives, what somebody has added goes too.
            match shall.others {
                Elements::Kept => self.load(shall)?,
                Elements::Removed => self.replace(shall)?,
            }
        }
        warn!("the nftables table does not stay as it is loaded: somebody changes it all the time");
        Ok(false)
    }

    fn load(&self, shall: &mut Shall) -> Result<(), NetworkError> {
        match self.apply(shall, |script| script) {
            Err(NetworkError::Program { detail, .. }) => {
                // Whatever the reason was, a transaction that fails has changed nothing.
                warn!(
                    detail,
                    "the nftables table could not be brought up to date and is replaced"
                );
                self.replace(shall)
            }
            other => other,
        }
    }

    fn replace(&self, shall: &mut Shall) -> Result<(), NetworkError> {
        self.apply(shall, |script| table::afresh(&script))
    }

    fn apply(&self, shall: &mut Shall, how: impl Fn(String) -> String) -> Result<(), NetworkError> {
        shall.listing = None;
        let script = table::script(
            self.host_access,
            &shall.notes,
            &shall.attached,
            shall.others,
        );
        let (chains, rules) = table::script_size(&script);
        program::run("nft", &["-f", "-"], &how(script))?;
        // Somebody may have taken something away in between: that is not how it shall be. An older
        // agent's chains without rules stay as long as its elements do.
        let whole = |listing: &String| match (table::listing_size(listing), shall.others) {
            ((some, all), Elements::Kept) => some >= chains && all == rules,
            (all, Elements::Removed) => all == (chains, rules),
        };
        shall.listing = Some(listed()?.0).filter(whole);
        Ok(())
    }

    fn shall(&self) -> MutexGuard<'_, Shall> {
        self.shall.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn told<T>(outcome: Result<T, NetworkError>) -> Option<T> {
    let tell = |error: &NetworkError| {
        warn!(
            error = error as &dyn Error,
            "something of the network is not as it shall be"
        );
    };
    outcome.inspect_err(tell).ok()
}

/// Whether the table is what was loaded, with the elements of what is attached. An error: nobody knows.
fn is_so(shall: &Shall, listed: Result<Listed, NetworkError>) -> Result<bool, NetworkError> {
    let (listed, elements) = match listed {
        Ok(listed) => listed,
        Err(error @ NetworkError::Hung { .. }) => return Err(error),
        // For example because there is none.
        Err(_) => return Ok(false),
    };
    let wanted: BTreeSet<String> = shall.attached.values().flat_map(table::elements).collect();
    let all = match shall.others {
        Elements::Kept => wanted.is_subset(&elements),
        Elements::Removed => wanted == elements,
    };
    Ok(all && shall.listing.as_ref() == Some(&listed))
}

/// The table as it is: its text, and its elements.
fn listed() -> Result<Listed, NetworkError> {
    let list = ["--stateless", "list", "table", "inet", table::TABLE];
    Ok(table::split(&program::run("nft", &list, "")?))
}
