//! The headers of `droplet.output.<droplet>.<index>.<handle>.<stdout or stderr>`.

/// The instance id.
pub const INSTANCE: &str = "Ostler-Instance";
/// Bytes of this stream before the first of this message, since the job began.
pub const OFFSET: &str = "Ostler-Offset";
/// When the bytes were read, in seconds since the epoch with nine decimals.
pub const TIME: &str = "Ostler-Time";
/// So many bytes are missing from the offset on; the body is a remark for people and no output.
pub const DROPPED: &str = "Ostler-Dropped";

/// The value of [`TIME`], from nanoseconds since the epoch.
#[must_use]
pub fn time(nanoseconds: u64) -> String {
    format!(
        "{}.{:09}",
        nanoseconds / 1_000_000_000,
        nanoseconds % 1_000_000_000
    )
}
