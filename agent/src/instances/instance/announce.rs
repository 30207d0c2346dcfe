//! Says events until the bus has them, one after the other, beside the instance's own life.

use super::events;
use crate::instances::outlet::Outlet;
use crate::instances::record::Event;
use messages::trace::Trace;
use tokio::sync::mpsc;

/// The instance's end. Dropping it leaves the rest unsaid: the record still has it.
pub(super) struct Announcer {
    events: mpsc::UnboundedSender<Event>,
    confirmed: mpsc::UnboundedReceiver<()>,
    /// Something is said and not confirmed yet.
    speaks: bool,
}

impl Announcer {
    /// Says them with the headers of `trace`.
    pub(super) fn start(outlet: Outlet, trace: Option<Trace>) -> Self {
        // Unbounded in type; in fact each holds one at most.
        let (events, mut to_say) = mpsc::unbounded_channel::<Event>();
        let (confirm, confirmed) = mpsc::unbounded_channel();
        tokio::spawn(async move {
            while let Some(event) = to_say.recv().await {
                let message = events::message(event, trace.as_ref());
                tokio::select! {
                    biased;
                    () = confirm.closed() => return,
                    () = outlet.deliver(&message) => {}
                }
                if confirm.send(()).is_err() {
                    return;
                }
            }
        });
        Self {
            events,
            confirmed,
            speaks: false,
        }
    }

    /// Says the oldest of these, unless something is being said: that is the oldest.
    pub(super) fn say(&mut self, unsent: &[Event]) {
        if let (false, Some(event)) = (self.speaks, unsent.first()) {
            self.speaks = true;
            drop(self.events.send(event.clone()));
        }
    }

    /// Resolves when the bus has what is being said.
    pub(super) async fn confirmed(&mut self) -> Option<()> {
        let confirmed = self.confirmed.recv().await;
        self.speaks = false;
        confirmed
    }
}
