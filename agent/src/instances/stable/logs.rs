//! What crashes left, told to whoever asks.

use super::{Reply, Stable};
use messages::command::LogsRequest;
use tokio::sync::oneshot;

impl Stable {
    /// Answered elsewhere: a disk may take its time.
    pub(super) fn logs(&self, request: LogsRequest, answer: oneshot::Sender<Reply>) {
        // An update gives one that has crashed another id, and a version: it is found by those, too.
        let here = self.matching(&request.filter);
        let here = here.map(|stall| stall.view.record.handle.clone()).collect();
        let (crashes, host) = (self.world.crashes.clone(), self.world.id.clone());
        let max_payload = self.link.max_payload;
        tokio::spawn(async move {
            let reply = crashes.answer(&request, &here, &host, max_payload).await;
            drop(answer.send(reply));
        });
    }
}
