//! What the router is told of one instance. Only here: whoever else said a route could say it again
//! after it was taken back, and then a router would send people to a dead port for two minutes.

use crate::instances::outlet::{Message, Outlet};
use messages::outgoing::{Route as Body, ToBytes};
use messages::subjects::{ROUTER_REGISTER, ROUTER_UNREGISTER};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// The route of one instance: what was told is what stands here. Shared by the instance, which opens,
/// changes and closes it, and the stable, which repeats it. Saying is not waiting, so the lock is short.
#[derive(Debug)]
pub struct Route {
    outlet: Outlet,
    told: Mutex<Option<Body>>,
}

impl Route {
    /// One that nobody was told of.
    pub(super) fn new(outlet: Outlet) -> Self {
        Self {
            outlet,
            told: Mutex::default(),
        }
    }

    /// Routers were told by an earlier life of the agent.
    pub(super) fn known(&self, route: Body) {
        *self.told() = Some(route);
    }

    /// The instance serves.
    pub(super) fn open(&self, route: Body) {
        let mut told = self.told();
        self.say(ROUTER_REGISTER, &route);
        *told = Some(route);
    }

    /// It has these URIs now; the router is told the difference.
    pub(super) fn change(&self, uris: &[String]) {
        let mut told = self.told();
        let Some(route) = told.as_mut() else { return };
        let old = std::mem::replace(&mut route.uris, uris.to_vec());
        for (subject, difference) in [
            (ROUTER_REGISTER, without(uris, &old)),
            (ROUTER_UNREGISTER, without(&old, uris)),
        ] {
            if !difference.is_empty() {
                let part = Body {
                    uris: difference,
                    ..route.clone()
                };
                self.say(subject, &part);
            }
        }
    }

    /// It serves no longer.
    pub(super) fn close(&self) {
        let mut told = self.told();
        if let Some(route) = told.take() {
            self.say(ROUTER_UNREGISTER, &route);
        }
    }

    /// Says it again, for routers forget.
    pub fn repeat(&self) {
        let told = self.told();
        if let Some(route) = told.as_ref().filter(|route| !route.uris.is_empty()) {
            self.say(ROUTER_REGISTER, route);
        }
    }

    fn say(&self, subject: &str, route: &Body) {
        self.outlet.offer(Message::plain(subject, route.to_bytes()));
    }

    fn told(&self) -> MutexGuard<'_, Option<Body>> {
        self.told.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn without(some: &[String], others: &[String]) -> Vec<String> {
    some.iter()
        .filter(|one| !others.contains(one))
        .cloned()
        .collect()
}

#[cfg(test)]
mod tests {
    use super::{Body, Route};
    use crate::instances::outlet::{Inlet, Link, Request, outlet};
    use std::collections::BTreeMap;

    fn body(uris: &[&str]) -> Body {
        Body {
            dea: "d".into(),
            app: "a".into(),
            uris: uris.iter().map(|uri| (*uri).to_owned()).collect(),
            host: "192.0.2.1".into(),
            port: 61001,
            tags: BTreeMap::new(),
            private_instance_id: "p".into(),
            private_instance_index: "0".into(),
        }
    }

    /// What was said: `+` or `-`, and the URIs.
    fn said(inlet: &mut Inlet) -> Vec<String> {
        let mut said = Vec::new();
        while let Ok(Request::Publish(message)) = inlet.control.try_recv() {
            let sign = if message.subject == "router.register" {
                '+'
            } else {
                '-'
            };
            let body: serde_json::Value = serde_json::from_slice(&message.body).unwrap();
            said.push(format!("{sign}{}", body["uris"]));
        }
        said
    }

    #[test]
    fn nothing_is_said_after_it_was_taken_back() {
        let (outlet, mut inlet) = outlet();
        inlet.link.send_replace(Link {
            up: true,
            connects: 1,
            max_payload: 1 << 20,
        });
        let route = Route::new(outlet);
        route.repeat();
        route.change(&["x".into()]);
        route.close();
        assert_eq!(said(&mut inlet), Vec::<String>::new());
        route.open(body(&["a", "b"]));
        route.repeat();
        route.change(&["b".into(), "c".into()]);
        route.repeat();
        route.close();
        route.close();
        route.repeat();
        route.change(&["d".into()]);
        let all = [
            r#"+["a","b"]"#,
            r#"+["a","b"]"#,
            r#"+["c"]"#,
            r#"-["a"]"#,
            r#"+["b","c"]"#,
            r#"-["b","c"]"#,
        ];
        assert_eq!(said(&mut inlet), all);
    }
}
