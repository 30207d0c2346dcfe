//! Says events until the bus has them, in order, beside the instance's own life.

use crate::instances::outlet::{Message, Outlet};
use crate::instances::record::Event;
use tokio::sync::mpsc;

/// The instance's end. Dropping it leaves the rest unsaid: the record still has it.
pub(super) struct Announcer {
    events: mpsc::UnboundedSender<Event>,
    confirmed: mpsc::UnboundedReceiver<()>,
}

impl Announcer {
    /// Begins with what an earlier life left unsent. Unbounded in type; in fact an instance has one exit
    /// and a few OOM events.
    pub(super) fn start(outlet: Outlet, unsent: &[Event]) -> Self {
        let (events, mut to_say) = mpsc::unbounded_channel::<Event>();
        let (confirm, confirmed) = mpsc::unbounded_channel();
        for event in unsent {
            drop(events.send(event.clone()));
        }
        tokio::spawn(async move {
            while let Some(event) = to_say.recv().await {
                let message = Message::plain(event.subject, event.body.to_string().into_bytes());
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
        Self { events, confirmed }
    }

    pub(super) fn say(&self, event: Event) {
        drop(self.events.send(event));
    }

    /// Resolves once for each event that the bus has, in order.
    pub(super) async fn confirmed(&mut self) -> Option<()> {
        self.confirmed.recv().await
    }
}
