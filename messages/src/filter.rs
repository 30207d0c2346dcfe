//! The filter that `dea.stop` and `dea.find.droplet` share (protocol 2.2).
//!
//! A trap of its history: a present but empty array once matched nothing and later everything. Here it
//! matches nothing where something would be stopped, and does not filter where something is only found.

use crate::field::{Fields, Read};
use crate::state::State;

/// What an empty array means.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Empty {
    /// No instance (stop).
    MatchesNothing,
    /// Any instance (find).
    MatchesAll,
}

/// A filter; its parts are ANDed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Filter {
    droplet: String,
    version: Option<String>,
    instances: Option<Vec<String>>,
    indices: Option<Vec<u64>>,
    states: Option<Vec<State>>,
}

/// What a filter looks at.
#[derive(Debug, Clone, Copy)]
pub struct Candidate<'a> {
    /// The app.
    pub droplet: &'a str,
    /// Its version.
    pub version: &'a str,
    /// The instance id.
    pub instance: &'a str,
    /// The index.
    pub index: u64,
    /// The state.
    pub state: State,
}

impl Filter {
    /// Reads the filter fields of a message.
    ///
    /// # Errors
    /// The first field that is wrong, in words; an unknown state name is one.
    pub fn read(fields: &Fields<'_>, empty: Empty) -> Read<Self> {
        Ok(Self {
            droplet: fields.id("droplet")?,
            version: match fields.get("version").and_then(serde_json::Value::as_bool) {
                Some(false) => None,
                _ => fields.optional_string("version")?,
            },
            instances: instances(fields, empty)?,
            indices: indices(fields, empty)?,
            states: states(fields, empty)?,
        })
    }

    /// The app.
    #[must_use]
    pub fn droplet(&self) -> &str {
        &self.droplet
    }

    /// The fields that are there and empty, so that nothing can match: most likely not what the sender meant.
    pub fn empty(&self) -> impl Iterator<Item = &'static str> {
        [
            ("version", self.version.as_deref() == Some("")),
            ("instances", self.instances.as_deref() == Some(&[])),
            ("indices", self.indices.as_deref() == Some(&[])),
            ("states", self.states.as_deref() == Some(&[])),
        ]
        .into_iter()
        .filter_map(|(field, empty)| empty.then_some(field))
    }

    /// Whether it matches.
    #[must_use]
    pub fn matches(&self, candidate: &Candidate<'_>) -> bool {
        fn within<T: PartialEq>(set: Option<&[T]>, is: impl Fn(&T) -> bool) -> bool {
            set.is_none_or(|set| set.iter().any(is))
        }
        self.droplet == candidate.droplet
            && self
                .version
                .as_deref()
                .is_none_or(|version| version == candidate.version)
            && within(self.instances.as_deref(), |id| id == candidate.instance)
            && within(self.indices.as_deref(), |index| *index == candidate.index)
            && within(self.states.as_deref(), |state| *state == candidate.state)
    }
}

/// `None` is no filter.
fn set<T>(items: Vec<T>, present: bool, empty: Empty) -> Option<Vec<T>> {
    match (items.is_empty(), present, empty) {
        (true, false, _) | (true, true, Empty::MatchesAll) => None,
        (true, true, Empty::MatchesNothing) | (false, ..) => Some(items),
    }
}

fn instances(fields: &Fields<'_>, empty: Empty) -> Read<Option<Vec<String>>> {
    let mut ids = Vec::new();
    let mut present = false;
    for key in ["instances", "instance_ids"] {
        present |= fields.get(key).is_some();
        for item in fields.optional_array(key)?.unwrap_or_default() {
            match item.as_str() {
                Some(id) => ids.push(id.to_owned()),
                None if item.is_null() => {}
                None => return Err(fields.refuse(key, "an array of strings")),
            }
        }
    }
    Ok(set(ids, present, empty))
}

fn indices(fields: &Fields<'_>, empty: Empty) -> Read<Option<Vec<u64>>> {
    let items = fields.optional_array("indices")?;
    // A text such as "1" is no index and matches none; it still makes the set one that filters.
    let numbers: Vec<u64> = items
        .unwrap_or_default()
        .iter()
        .filter_map(serde_json::Value::as_u64)
        .collect();
    let only_foreign = items.is_some_and(|items| items.iter().any(|item| !item.is_null()));
    if numbers.is_empty() && only_foreign {
        return Ok(Some(numbers));
    }
    Ok(set(numbers, items.is_some(), empty))
}

fn states(fields: &Fields<'_>, empty: Empty) -> Read<Option<Vec<State>>> {
    let items = fields.optional_array("states")?.unwrap_or_default();
    let states = items
        .iter()
        .filter(|item| !item.is_null())
        .map(|item| item.as_str().and_then(State::parse))
        .collect::<Option<Vec<_>>>()
        .ok_or_else(|| fields.refuse("states", "an array of state names, like \"RUNNING\""))?;
    Ok(set(states, fields.get("states").is_some(), empty))
}

#[cfg(test)]
mod tests {
    use super::{Candidate, Empty, Filter};
    use crate::field::Fields;
    use crate::state::State;
    use serde_json::{Value, json};

    const ONE: Candidate<'_> = Candidate {
        droplet: "a",
        version: "v",
        instance: "i",
        index: 1,
        state: State::Running,
    };

    fn read(value: &Value, empty: Empty) -> Result<bool, String> {
        let filter = Filter::read(&Fields::of(value, "").unwrap(), empty);
        filter
            .map(|filter| filter.matches(&ONE))
            .map_err(|bad| bad.message)
    }

    /// Body, whether a stop matches, whether a find does.
    #[test]
    fn the_table_of_empty_sets() {
        for (body, stops, finds) in [
            (json!({"droplet": "a"}), true, true),
            (json!({"droplet": "b"}), false, false),
            (json!({"droplet": "a", "version": "v"}), true, true),
            (json!({"droplet": "a", "version": "w"}), false, false),
            (json!({"droplet": "a", "version": null}), true, true),
            (json!({"droplet": "a", "version": false}), true, true),
            (json!({"droplet": "a", "version": ""}), false, false),
            (json!({"droplet": "a", "instances": null}), true, true),
            (json!({"droplet": "a", "instances": []}), false, true),
            (json!({"droplet": "a", "instances": [null]}), false, true),
            (json!({"droplet": "a", "instances": ["i"]}), true, true),
            (
                json!({"droplet": "a", "instances": ["x"], "instance_ids": ["i"]}),
                true,
                true,
            ),
            (json!({"droplet": "a", "instances": ["x"]}), false, false),
            (json!({"droplet": "a", "indices": []}), false, true),
            (json!({"droplet": "a", "indices": null}), true, true),
            (json!({"droplet": "a", "indices": [null]}), false, true),
            (json!({"droplet": "a", "indices": [null, 1]}), true, true),
            (json!({"droplet": "a", "indices": [1]}), true, true),
            (json!({"droplet": "a", "indices": ["1"]}), false, false),
            (json!({"droplet": "a", "indices": [0, 2]}), false, false),
            (json!({"droplet": "a", "states": []}), false, true),
            (json!({"droplet": "a", "states": null}), true, true),
            (json!({"droplet": "a", "states": [null]}), false, true),
            (
                json!({"droplet": "a", "states": [null, "Running"]}),
                true,
                true,
            ),
            (json!({"droplet": "a", "states": ["running"]}), true, true),
            (json!({"droplet": "a", "states": ["STOPPED"]}), false, false),
        ] {
            assert_eq!(read(&body, Empty::MatchesNothing), Ok(stops), "stop {body}");
            assert_eq!(read(&body, Empty::MatchesAll), Ok(finds), "find {body}");
        }
    }

    #[test]
    fn what_is_empty_is_named() {
        for (body, stop, find) in [
            (json!({"droplet": "a"}), &[][..], &[][..]),
            (json!({"droplet": "a", "indices": [2]}), &[], &[]),
            (json!({"droplet": "a", "states": null}), &[], &[]),
            (
                json!({"droplet": "a", "version": ""}),
                &["version"],
                &["version"],
            ),
            (
                json!({"droplet": "a", "instance_ids": []}),
                &["instances"],
                &[],
            ),
            (
                json!({"droplet": "a", "indices": ["1"]}),
                &["indices"],
                &["indices"],
            ),
            (
                json!({"droplet": "a", "indices": [], "states": [null]}),
                &["indices", "states"],
                &[],
            ),
        ] {
            for (empty, named) in [(Empty::MatchesNothing, stop), (Empty::MatchesAll, find)] {
                let filter = Filter::read(&Fields::of(&body, "").unwrap(), empty).unwrap();
                assert_eq!(filter.empty().collect::<Vec<_>>(), named, "{body}");
            }
        }
    }

    #[test]
    fn what_is_no_filter_is_named() {
        for (body, field) in [
            (json!({}), "`droplet`"),
            (json!({"droplet": "a", "instances": "i"}), "`instances`"),
            (json!({"droplet": "a", "instances": [1]}), "`instances`"),
            (json!({"droplet": "a", "indices": 1}), "`indices`"),
            (json!({"droplet": "a", "states": ["FLYING"]}), "`states`"),
            (json!({"droplet": "a", "states": [1]}), "`states`"),
            (json!({"droplet": "a", "states": "RUNNING"}), "`states`"),
            (json!({"droplet": "a", "version": 1}), "`version`"),
        ] {
            let error = read(&body, Empty::MatchesNothing).unwrap_err();
            assert!(error.contains(field), "{body}: {error}");
        }
    }
}
