//! One instance's part in what routers are told, and what its record says of it. Who speaks are the
//! [`Routes`](crate::instances::routes::Routes).

use super::{Instance, events};
use crate::instances::record::TakenBack;
use crate::instances::routes::Heard;
use messages::outgoing::Route;
use std::collections::VecDeque;
use std::time::Duration;
use tokio::time::{Instant, timeout_at};

/// How long an app that shall end is kept from its TERM, so that routers hear of it first.
const HEARING: Duration = Duration::from_millis(100);

/// What was taken back and may not have been heard: one for each in the record, in that order.
#[derive(Debug, Default)]
pub(super) struct Unheard(VecDeque<Heard>);

impl Unheard {
    /// Resolves when the oldest was heard.
    pub(super) async fn heard(&mut self) {
        match self.0.front_mut() {
            // What is no longer taken back need not be heard.
            Some(heard) => drop(heard.await),
            None => std::future::pending().await,
        }
        self.0.pop_front();
    }

    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

impl Instance {
    /// What an earlier life of the agent told, or did not know to be told.
    pub(super) fn know_route(&mut self) {
        let view = self.view();
        for taken_back in &self.record.taken_back {
            let taken_back = taken_back.clone();
            let heard = self.world.routes.take_back(Route {
                host: taken_back.host,
                uris: taken_back.uris,
                ..events::route(&self.world, &view, taken_back.port)
            });
            self.unheard.0.push_back(heard);
        }
        if let (true, Some(port)) = (self.record.serves(), self.record.port) {
            let route = events::route(&self.world, &view, port);
            self.world.routes.known(route);
        }
    }

    /// It serves.
    pub(super) fn open_route(&self) {
        if let Some(port) = self.record.port {
            let route = events::route(&self.world, &self.view(), port);
            self.world.routes.open(route);
        }
    }

    /// Its URIs have changed. The record is the caller's to save.
    pub(super) fn change_route(&mut self) {
        let Some(port) = self.record.port else { return };
        let taken_back = self.world.routes.change(port, &self.record.uris);
        self.note(taken_back);
    }

    /// It serves no longer. The record is the caller's to save.
    pub(super) fn close_route(&mut self) {
        let Some(port) = self.record.port else { return };
        let taken_back = self.world.routes.close(port);
        self.note(taken_back);
    }

    fn note(&mut self, taken_back: Option<(Route, Heard)>) {
        if let Some((route, heard)) = taken_back {
            self.unheard.0.push_back(heard);
            self.record.taken_back.push(TakenBack {
                host: route.host,
                port: route.port,
                uris: route.uris,
            });
        }
    }

    /// Waits until all that was taken back was heard, but not for long.
    pub(super) async fn routers_hear(&mut self) {
        let deadline = Instant::now() + HEARING;
        let has_uris = |one: &TakenBack| !one.uris.is_empty();
        while self.record.taken_back.iter().any(has_uris)
            && timeout_at(deadline, self.unheard.heard()).await.is_ok()
        {
            self.record.taken_back.remove(0);
        }
    }

    /// The oldest was heard. Where an event is unsent, its confirmation saves the record anyway.
    pub(super) async fn route_heard(&mut self) {
        if !self.record.taken_back.is_empty() {
            self.record.taken_back.remove(0);
        }
        if self.record.unsent.is_empty() {
            self.keep().await;
        }
    }
}
