//! How much a container may receive: a token bucket on the host's end of its link, which makes the
//! senders wait. How much it may send is an element of the table (`rates`): what is too much is dropped as
//! it comes in. Changing either is one message and leaves no moment without a limit.
//!
//! Numbers are those of linux/pkt_sched.h.

use super::NetworkError;
use super::decode::find;
use super::link::{Links, errno, failed};
use futures_util::StreamExt as _;
use nix::errno::Errno;
use rtnetlink::packet_core::{
    DefaultNla, NLM_F_ACK, NLM_F_CREATE, NLM_F_ECHO, NLM_F_REPLACE, NLM_F_REQUEST, NetlinkMessage,
    NetlinkPayload, Nla as _,
};
use rtnetlink::packet_route::RouteNetlinkMessage;
use rtnetlink::packet_route::tc::{TcAttribute, TcHandle, TcMessage, TcOption};
use serde::{Deserialize, Serialize};

const TBF: &str = "tbf";
const TCA_TBF_PARMS: u16 = 1;
const TCA_TBF_RATE64: u16 = 4;
const TCA_TBF_BURST: u16 = 6;
const TC_LINKLAYER_ETHERNET: u8 = 1;

/// Least and most bytes that go out at once: the largest packet of any link, and a jumble of them.
const BURST: (u64, u64) = (64 << 10, 4 << 20);

/// Bytes per second; `None`: as many as there are.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Bandwidth {
    /// Into the container.
    pub into: Option<u64>,
    /// Out of it.
    pub out: Option<u64>,
}

impl Links {
    /// Lets so many bytes per second into a container.
    pub(super) async fn shape(&self, link: &str, rate: Option<u64>) -> Result<(), NetworkError> {
        let mut message = self.root_of(link).await?;
        let create = NLM_F_CREATE | NLM_F_REPLACE;
        let (request, flags) = match rate {
            Some(rate) => {
                message.attributes = vec![
                    TcAttribute::Kind(TBF.to_owned()),
                    TcAttribute::Options(bucket(rate)),
                ];
                (RouteNetlinkMessage::NewQueueDiscipline(message), create)
            }
            None => (RouteNetlinkMessage::DelQueueDiscipline(message), 0),
        };
        match self.ask(request, flags).await {
            // There was none to remove.
            Err(error) if rate.is_none() && errno(&error) == Some(Errno::ENOENT) => Ok(()),
            Err(error) => Err(failed("limit", link, error)),
            Ok(_) => Ok(()),
        }
    }

    /// How many bytes per second are let into a container.
    pub(super) async fn shaped(&self, link: &str) -> Result<Option<u64>, NetworkError> {
        let message = self.root_of(link).await?;
        let request = RouteNetlinkMessage::GetQueueDiscipline(message);
        // Older kernels answer to those only who want to hear of their own doing.
        match self.ask(request, NLM_F_ECHO).await {
            Ok(found) => Ok(found.iter().find_map(rate_of)),
            Err(error) if errno(&error) == Some(Errno::ENOENT) => Ok(None),
            Err(error) => Err(failed("find the limit of", link, error)),
        }
    }

    /// Names what queues on a link.
    async fn root_of(&self, link: &str) -> Result<TcMessage, NetworkError> {
        let missing = || failed("find", link, rtnetlink::Error::RequestFailed);
        let index = self.index(link).await?.ok_or_else(missing)?;
        let mut message = TcMessage::default();
        message.header.index = index.cast_signed();
        message.header.parent = TcHandle::ROOT;
        Ok(message)
    }

    async fn ask(
        &self,
        request: RouteNetlinkMessage,
        flags: u16,
    ) -> Result<Vec<TcMessage>, rtnetlink::Error> {
        let mut request = NetlinkMessage::from(request);
        request.header.flags = NLM_F_REQUEST | NLM_F_ACK | flags;
        let mut answers = self.handle.clone().request(request)?;
        let mut found = Vec::new();
        while let Some(answer) = answers.next().await {
            if let NetlinkPayload::Error(error) = answer.payload {
                // Without a code: done.
                if error.code.is_some() {
                    return Err(rtnetlink::Error::NetlinkError(error));
                }
            } else if let NetlinkPayload::InnerMessage(RouteNetlinkMessage::NewQueueDiscipline(
                one,
            )) = answer.payload
            {
                found.push(one);
            }
        }
        Ok(found)
    }
}

/// struct `tc_tbf_qopt` and what does not fit into it. A twentieth of a second may go out at once, a tenth
/// more may wait.
fn bucket(rate: u64) -> Vec<TcOption> {
    let burst = (rate / 20).clamp(BURST.0, BURST.1);
    let word = |bytes: u64| u32::try_from(bytes).unwrap_or(u32::MAX).to_ne_bytes();
    let mut parameters = vec![0, TC_LINKLAYER_ETHERNET, 0, 0, 0, 0, 0, 0];
    parameters.extend(word(rate));
    // No second rate for peaks.
    parameters.extend([0; 12]);
    for bytes in [burst + rate / 10, 0, 0] {
        parameters.extend(word(bytes));
    }
    [
        DefaultNla::new(TCA_TBF_PARMS, parameters),
        DefaultNla::new(TCA_TBF_RATE64, rate.to_ne_bytes().to_vec()),
        DefaultNla::new(TCA_TBF_BURST, word(burst).to_vec()),
    ]
    .map(TcOption::Other)
    .to_vec()
}

fn rate_of(message: &TcMessage) -> Option<u64> {
    let all = message.attributes.iter();
    let tbf = all
        .clone()
        .any(|one| matches!(one, TcAttribute::Kind(kind) if kind == TBF));
    let mut options = all.filter_map(|one| {
        if let TcAttribute::Options(options) = one {
            options.first().filter(|_| tbf)
        } else {
            None
        }
    });
    let Some(TcOption::Other(nested)) = options.next() else {
        return None;
    };
    let mut options = vec![0; nested.value_len()];
    nested.emit_value(&mut options);
    if let Some(rate) = find(&options, TCA_TBF_RATE64) {
        return Some(u64::from_ne_bytes(*rate.first_chunk()?));
    }
    let rate = find(&options, TCA_TBF_PARMS)?.get(8..)?.first_chunk()?;
    Some(u32::from_ne_bytes(*rate).into())
}
