//! What lets containers' packets pass, kept so whoever else changes the host's rules: our table with
//! the elements of what is attached, forwarding, and the accepts in others' chains.
//!
//! Everything here blocks: the kernel works off one transaction at a time, also others' large ones, and
//! programs are run where the table is loaded, and where others' rules are looked at.
//!
//! The rules are a small text, which `nft` loads in one transaction; elements go over netlink, of one
//! container in one transaction ([`super::difference`]). Only where the table cannot be brought up to date
//! (an older agent's has sets of other types) is all of it, with all elements, one text.

use super::conntrack::Tracked;
use super::decode::Chain;
use super::difference::{TRANSACTION, There};
use super::element::Element;
use super::foreign::{self, Accepts};
use super::nfnetlink::{CHANGES_MAX, Difference, Layout, Nftables};
use super::table::{self, Elements, Policy};
use super::watch::Changes;
use super::{Attached, Bandwidth, Lease, NetworkError, program, sysctl};
use nix::errno::Errno;
use std::collections::{BTreeMap, BTreeSet};
use std::error::Error;
use std::net::Ipv4Addr;
use std::sync::{Mutex, MutexGuard, PoisonError};
use tracing::{info, warn};

pub(super) const FORWARDING: &str = "ipv4/ip_forward";
/// A chain without packets that says what `close` must put back, also if another agent closes. Beside
/// it are those for chains of others (`foreign::forwarders`) that were there when nothing was forwarded.
const FORWARDING_NOTE: &str = "ip_forward_was_off";

/// How often the table is loaded before it is left for a while: somebody else is at it.
const ROUNDS: usize = 3;

/// How many elements the egress rules of all containers may be together. To list a set, the kernel begins
/// at its beginning for every 32 KiB of the answer: what takes it a second here takes sixteen at four times
/// as many, at every start and every look.
pub(super) const RULE_ELEMENTS_MAX: usize = 200_000;

/// The table as it is.
type Listed = (Layout, There);

/// What there is to begin with.
#[derive(Debug)]
enum Found {
    /// Nothing that a packet comes to.
    Nothing,
    /// A table that has our sets, and these elements.
    Ours(There),
    /// One that has not.
    Another,
}

/// The keeper of the rules in the network namespace in which it was opened.
#[derive(Debug)]
pub(super) struct Rules {
    nftables: Nftables,
    /// Another socket: a look at many elements takes long, and containers shall not wait for it.
    eyes: Nftables,
    tracked: Tracked,
    policy: Policy,
    shall: Mutex<Shall>,
    /// Of its own, because iptables waits for others, and containers shall not wait for it.
    accepts: Mutex<Accepts>,
}

/// What shall be so.
#[derive(Debug)]
struct Shall {
    /// By handle.
    attached: BTreeMap<String, Attached>,
    /// How many elements the egress rules of those are that have some.
    weights: BTreeMap<String, usize>,
    /// `Kept` until somebody has said what lives: a former agent's containers may.
    others: Elements,
    /// Chains that no packet passes: whether forwarding was off, and who did not mind.
    notes: BTreeSet<String>,
    /// What the table is without elements. `None`: it was not loaded, or not seen whole since.
    layout: Option<Layout>,
    /// This agent has loaded it. Until then an older agent's may do.
    loaded: bool,
    /// For a time the table was not so, and connections may have been made that it refuses.
    gap: bool,
    /// Nothing is mended any more.
    closed: bool,
}

impl Rules {
    /// Table first: without it nothing of a container's may be forwarded. Tells, too, whether all is so.
    pub(super) fn open(policy: Policy, changes: &Changes) -> Result<(Self, bool), NetworkError> {
        let [nftables, eyes] = [Nftables::open(table::TABLE)?, Nftables::open(table::TABLE)?];
        changes.ignore(nftables.port()?);
        let tracked = Tracked::open()?;
        let chains = nftables.chains()?;
        let has_rules = |chain: &Chain| table::CHAINS.contains(&chain.name.as_str());
        let is_note =
            |chain: &&Chain| chain.is_in(table::TABLE) && !chain.is_base() && !has_rules(chain);
        let notes = chains.iter().filter(is_note);
        let mut notes: BTreeSet<_> = notes.map(|chain| chain.name.clone()).collect();
        if sysctl::read(FORWARDING)? == "0" && notes.insert(FORWARDING_NOTE.to_owned()) {
            warn!(
                "forwarding was off and is switched on, for containers need it: this host passes packets between all of \
                 its networks now, unless rules of its own keep it from that"
            );
            let found = told(foreign::forwarders(&chains)).unwrap_or_default();
            notes.extend(
                found
                    .iter()
                    .map(|(name, rules)| foreign::note(name, *rules)),
            );
        }
        let rules = Self {
            nftables,
            eyes,
            tracked,
            policy,
            shall: Mutex::new(Shall {
                attached: BTreeMap::new(),
                weights: BTreeMap::new(),
                others: Elements::Kept,
                notes,
                layout: None,
                loaded: false,
                gap: false,
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
        // First: the look below takes its time.
        let forwarding = self.forward();
        // Mostly all is so, and containers that come and go need not wait for a look at all of it.
        let seen = self.listed();
        let mut shall = self.shall();
        if shall.closed {
            return true;
        }
        let table = || match self.is_so(&shall, seen)? {
            true => Ok(true),
            false => self.mend_table(&mut shall, changes),
        };
        let table = told(table());
        drop(shall);
        let settled = self.settle();
        table == Some(true) && forwarding && settled
    }

    /// Switches forwarding on where somebody has switched it off; tells whether it is on.
    fn forward(&self) -> bool {
        // Held, lest it is on after the end.
        let shall = self.shall();
        if shall.closed {
            return true;
        }
        let written = told(sysctl::write(FORWARDING, "1"));
        if written == Some(true) {
            warn!("forwarding was switched off by somebody and is on again: containers need it");
        }
        written.is_some()
    }

    /// Lets a container speak from its address, and go where its rules allow. Undone on failure.
    pub(super) fn attach(&self, attached: Attached) -> Result<(), NetworkError> {
        let elements = table::elements(&self.policy, &attached)?;
        let weight = weight(&elements);
        let mut shall = self.shall();
        has_room(&shall.weights, weight)?;
        let added = elements
            .chunks(CHANGES_MAX)
            .try_for_each(|some| self.add(&mut shall, some));
        if added.is_err() {
            // The first error is the one to tell; what was left goes with the next mending.
            let _ = self.remove(&elements);
            return added;
        }
        if weight > 0 {
            shall.weights.insert(attached.handle.clone(), weight);
        }
        shall.attached.insert(attached.handle.clone(), attached);
        Ok(())
    }

    /// Changes how many bytes per second an attached container may send, and notes what it may receive.
    pub(super) fn limit(&self, handle: &str, bandwidth: Bandwidth) -> Result<(), NetworkError> {
        let mut shall = self.shall();
        let known = shall.attached.get_mut(handle);
        let known = known.ok_or_else(|| NetworkError::Detached(handle.to_owned()))?;
        // Any rate: a removal names the address only.
        let element = table::rate(known.lease.container, bandwidth.out.unwrap_or(1));
        match bandwidth.out {
            Some(_) => self.nftables.replace(&element)?,
            None => self.nftables.remove(std::slice::from_ref(&element))?,
        }
        known.bandwidth = bandwidth;
        Ok(())
    }

    /// The addresses of an attached container, and how many bytes per second it may receive.
    pub(super) fn end_of(&self, handle: &str) -> Option<(Lease, Option<u64>)> {
        let shall = self.shall();
        let one = shall.attached.get(handle)?;
        Some((one.lease.clone(), one.bandwidth.into))
    }

    /// How many bytes per second the kernel lets a container send; `None`: as many as it can.
    pub(super) fn rate(&self, container: Ipv4Addr) -> Result<Option<u64>, NetworkError> {
        let all = self.nftables.elements(&[table::RATES])?;
        let mut all = all.into_iter();
        let rate = all.find(|(_, key, _)| *key == container.octets());
        let bytes = rate.and_then(|(_, _, rate)| rate.first_chunk().copied());
        Ok(bytes.map(u64::from_be_bytes))
    }

    /// Leads a port of the host (`outer`) to one of an attached container (`inner`).
    pub(super) fn map(&self, handle: &str, (outer, inner): (u16, u16)) -> Result<(), NetworkError> {
        let mut shall = self.shall();
        // The caller may have gone away and a `detach` come before this.
        let Some(known) = shall.attached.get(handle) else {
            return Err(NetworkError::Detached(handle.to_owned()));
        };
        let element = table::port(known.lease.container, outer, inner);
        self.add(&mut shall, std::slice::from_ref(&element))?;
        if let Some(Attached { ports, .. }) = shall.attached.get_mut(handle)
            && !ports.contains(&(outer, inner))
        {
            ports.push((outer, inner));
        }
        Ok(())
    }

    /// Takes away what was added for a container; what is not there is no error. After one, the next
    /// mending finds what was left.
    pub(super) fn detach(&self, attached: &Attached) -> Result<(), NetworkError> {
        let mut shall = self.shall();
        let mut all = attached.clone();
        shall.weights.remove(&attached.handle);
        if let Some(known) = shall.attached.remove(&attached.handle) {
            all.egress = known.egress;
            all.bandwidth = known.bandwidth;
            // By host port, which alone says what goes.
            let ports: BTreeMap<u16, u16> = known.ports.into_iter().chain(all.ports).collect();
            all.ports = ports.into_iter().collect();
        }
        let elements = table::elements(&self.policy, &all)?;
        // Its ways in and out go together, whatever comes of the rest.
        let ways = elements.len().min((all.ports.len() + 2).max(CHANGES_MAX));
        let (ways, rest) = elements.split_at_checked(ways).unwrap_or((&elements, &[]));
        let removed = self.nftables.remove(ways);
        removed.and(self.remove(rest))
    }

    /// Removes elements, some at a time where they are many; tells the first error, after all were tried.
    fn remove(&self, elements: &[Element]) -> Result<(), NetworkError> {
        let mut outcome = Ok(());
        for some in elements.chunks(CHANGES_MAX) {
            outcome = outcome.and(self.nftables.remove(some));
        }
        outcome
    }

    /// Forgets the connections of a container ([`Tracked::forget`]).
    pub(super) fn forget(&self, container: Ipv4Addr) -> Result<(), NetworkError> {
        self.tracked.forget(container)
    }

    /// Makes the table hold exactly these.
    pub(super) fn rebuild(&self, live: Vec<Attached>) -> Result<(), NetworkError> {
        let mut weights = BTreeMap::new();
        for one in live.iter().filter(|one| !one.egress.is_empty()) {
            let elements = table::elements(&self.policy, one)?;
            weights.insert(one.handle.clone(), weight(&elements));
        }
        let mut shall = self.shall();
        let live = live.into_iter();
        shall.attached = live.map(|one| (one.handle.clone(), one)).collect();
        shall.weights = weights;
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
            return sysctl::write(FORWARDING, "0").map(drop);
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

    /// Adds elements; where the table is gone, with it.
    fn add(&self, shall: &mut Shall, elements: &[Element]) -> Result<(), NetworkError> {
        let added = self.nftables.add(elements);
        match added {
            Err(NetworkError::Table {
                errno: Errno::ENOENT,
                ..
            }) if !shall.closed => {
                warn!("the nftables table was removed by somebody and is loaded again");
                self.load(shall)?;
                self.nftables.add(elements)
            }
            other => other,
        }
    }

    /// Tells whether the table is so: somebody else may be at it all the time.
    fn mend_table(&self, shall: &mut Shall, changes: &Changes) -> Result<bool, NetworkError> {
        for round in 0..=ROUNDS {
            // What the look below sees is no news afterwards, what we do ourselves neither.
            changes.drain();
            if self.is_so(shall, self.listed())? {
                return Ok(true);
            }
            if round == ROUNDS {
                break;
            }
            if shall.layout.is_some() {
                warn!("the nftables table was changed by somebody and is loaded again");
                shall.gap = true;
            }
            self.load(shall)?;
            if !shall.loaded {
                return Ok(false);
            }
        }
        warn!("the nftables table does not stay as it is loaded: somebody changes it all the time");
        Ok(false)
    }

    /// Brings the table up to date, or puts another in its place in one transaction. An older agent's that
    /// must be replaced stays in force until it is known what lives: without the elements of that, traffic
    /// would be cut.
    fn load(&self, shall: &mut Shall) -> Result<(), NetworkError> {
        shall.layout = None;
        let found = self.found()?;
        let nothing = matches!(found, Found::Nothing);
        shall.gap |= !self.eyes.layout()?.acts();
        match self.update(shall, found) {
            Ok(true) => {}
            Ok(false) | Err(NetworkError::Program { .. } | NetworkError::Table { .. })
                if !nothing && !shall.loaded && shall.others == Elements::Kept =>
            {
                info!("an older agent's nftables table stays until it is known what lives");
                return Ok(());
            }
            Ok(false) => self.replace(shall)?,
            Err(error @ (NetworkError::Program { .. } | NetworkError::Table { .. })) => {
                // A transaction that fails has changed nothing.
                let error = &error as &dyn Error;
                warn!(
                    error,
                    "the nftables table could not be brought up to date and is replaced"
                );
                self.replace(shall)?;
            }
            Err(other) => return Err(other),
        }
        shall.loaded = true;
        self.look(shall)?;
        if shall.layout.is_none() && shall.others == Elements::Removed {
            self.replace(shall)?;
            self.look(shall)?;
        }
        if std::mem::replace(&mut shall.gap, false) {
            told(self.close_gap(shall));
            // Of those that are not known yet, too.
            shall.gap = shall.others == Elements::Kept;
        }
        Ok(())
    }

    fn found(&self) -> Result<Found, NetworkError> {
        match self.eyes.elements(&table::SET_NAMES) {
            Ok(elements) => Ok(Found::Ours(There::new(elements))),
            Err(NetworkError::Table {
                errno: Errno::ENOENT,
                ..
            }) if self.eyes.layout()?.acts() => Ok(Found::Another),
            Err(NetworkError::Table {
                errno: Errno::ENOENT,
                ..
            }) => Ok(Found::Nothing),
            Err(other) => Err(other),
        }
    }

    /// The rules, and then what is different of the elements. Where there is no table everything is open,
    /// so the rules come first, with what containers are cut off without; what their own rules allow
    /// follows. `false`: it takes another table.
    fn update(&self, shall: &Shall, found: Found) -> Result<bool, NetworkError> {
        let rules = |ways: &[Element]| {
            let script = table::script(&self.policy, &shall.notes, ways);
            program::run("nft", &["-f", "-"], &script)
        };
        let there = match found {
            Found::Another => return Ok(false),
            Found::Ours(there) => {
                rules(&[])?;
                there
            }
            Found::Nothing => {
                let mut ways = Vec::new();
                for one in shall.attached.values() {
                    let mut elements = table::elements(&self.policy, one)?;
                    elements.retain(|element| table::is_way(element.set));
                    ways.extend(elements);
                }
                rules(&ways)?;
                There::new(self.eyes.elements(&table::SET_NAMES)?)
            }
        };
        let mut pending = Difference::default();
        self.differences(shall, there, |more| {
            if !pending.is_empty() && pending.len() + more.len() > TRANSACTION {
                self.nftables.change(&std::mem::take(&mut pending))?;
            }
            pending.append(more);
            Ok(())
        })?;
        if !pending.is_empty() {
            self.nftables.change(&pending)?;
        }
        Ok(true)
    }

    /// Everything anew, as one text and so in one transaction.
    fn replace(&self, shall: &Shall) -> Result<(), NetworkError> {
        let attached = shall.attached.values();
        let each = attached.map(|one| table::elements(&self.policy, one));
        let elements = each.collect::<Result<Vec<_>, _>>()?.concat();
        let script = table::script(&self.policy, &shall.notes, &elements);
        program::run("nft", &["-f", "-"], &table::afresh(&script)).map(drop)
    }

    /// Remembers what was loaded. Somebody may have taken something away in between: that is not how it
    /// shall be. An older agent's chains without rules stay as long as its elements do.
    fn look(&self, shall: &mut Shall) -> Result<(), NetworkError> {
        let script = table::script(&self.policy, &shall.notes, &[]);
        let (chains, rules) = table::script_size(&script);
        let whole = |layout: &Layout| match (layout.size(), shall.others) {
            ((some, all), Elements::Kept) => some >= chains && all == rules,
            (all, Elements::Removed) => all == (chains, rules),
        };
        shall.layout = Some(self.eyes.layout()?).filter(whole);
        Ok(())
    }

    /// Connections that were made without the table would live on with it.
    fn close_gap(&self, shall: &Shall) -> Result<(), NetworkError> {
        let attached = shall.attached.values();
        let attached: BTreeMap<_, _> = attached.map(|one| (one.lease.container, one)).collect();
        if attached.is_empty() {
            return Ok(());
        }
        let refused = |one: &_| table::refuses(&self.policy, &attached, one);
        let forgotten = self.tracked.forget_those(refused)?;
        if forgotten > 0 {
            warn!(
                forgotten,
                "connections that were made without the nftables table, and that it refuses, were forgotten"
            );
        }
        Ok(())
    }

    /// Whether the table is what was loaded, with the elements of what is attached. An error: nobody knows.
    fn is_so(
        &self,
        shall: &Shall,
        listed: Result<Listed, NetworkError>,
    ) -> Result<bool, NetworkError> {
        let (layout, there) = match listed {
            Ok(listed) => listed,
            Err(NetworkError::Table {
                errno: Errno::ENOENT,
                ..
            }) => return Ok(false),
            Err(other) => return Err(other),
        };
        let mut so = shall.layout.as_ref() == Some(&layout);
        self.differences(shall, there, |difference| {
            so &= difference.is_empty();
            Ok(())
        })?;
        Ok(so)
    }

    /// What must change: first what belongs to nobody goes, where it is known what lives; then container by
    /// container.
    fn differences(
        &self,
        shall: &Shall,
        mut there: There,
        mut each: impl FnMut(Difference) -> Result<(), NetworkError>,
    ) -> Result<(), NetworkError> {
        let attached = || shall.attached.values();
        if shall.others == Elements::Removed {
            let known = attached().map(|one| one.lease.container).collect();
            for some in there.of_others(&known).chunks(TRANSACTION) {
                each(Difference {
                    removed: some.to_vec(),
                    added: Vec::new(),
                })?;
            }
        }
        for one in attached() {
            let wanted = table::elements(&self.policy, one)?;
            each(there.difference(one.lease.container, wanted, shall.others))?;
        }
        Ok(())
    }

    /// The table as it is.
    fn listed(&self) -> Result<Listed, NetworkError> {
        let layout = self.eyes.layout()?;
        let elements = self.eyes.elements(&table::SET_NAMES)?;
        Ok((layout, There::new(elements)))
    }

    /// As long as this is held, nobody sees the table.
    #[cfg(test)]
    pub(super) fn look_slowly(&self) -> MutexGuard<'_, super::nfnetlink::Socket> {
        self.eyes.hold()
    }

    fn shall(&self) -> MutexGuard<'_, Shall> {
        self.shall.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// How many elements the egress rules of a container are.
fn weight(elements: &[Element]) -> usize {
    let rules = elements.iter().filter(|one| !table::is_way(one.set));
    rules.count()
}

/// A container without rules always has room.
fn has_room(weights: &BTreeMap<String, usize>, wanted: usize) -> Result<(), NetworkError> {
    let held = weights.values().sum::<usize>();
    if wanted > 0 && held.saturating_add(wanted) > RULE_ELEMENTS_MAX {
        let max = RULE_ELEMENTS_MAX;
        return Err(NetworkError::NoRoomForRules { wanted, held, max });
    }
    Ok(())
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
