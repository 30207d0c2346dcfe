//! Droplets: gzipped tarballs of `./app`, `./logs`, `./tmp` and `./staging_info.yml`.

use std::io::Write;

use flate2::{Compression, write::GzEncoder};
use sha1::{Digest, Sha1};
use sha2::Sha256;
use tar::{Builder, EntryType, Header};

use crate::{fixtures, tool};

/// A droplet's bytes. Make one of a shell script, of a sample app, or entry by entry.
#[derive(Debug, Clone)]
pub struct Droplet(pub Vec<u8>);

const PROBE: &str = r#"
cat > probe.rb <<'END'
require 'socket'
server = TCPServer.new('0.0.0.0', ENV['PORT'].to_i)
loop do
  Thread.new(server.accept) do |client|
    what, address, port = client.gets.to_s.split
    case what
    when 'try'
      begin
        Socket.tcp(address, port.to_i, connect_timeout: 5).close
        client.puts 'open'
      rescue SystemCallError
        client.puts 'shut'
      end
    when 'ask'
      socket = UDPSocket.new
      socket.connect(address, port.to_i)
      socket.send('question', 0)
      client.puts((IO.select([socket], nil, nil, 5) && socket.recv(16) rescue 'shut') || 'shut')
    when 'send' then client.write('x' * address.to_i)
    when 'take'
      bytes = 0
      while (some = client.readpartial(65536) rescue nil)
        bytes += some.bytesize
      end
      client.puts bytes
    when 'echo'
      while (line = client.gets)
        client.write line
      end
    end
    client.close
  end
end
END
exec ruby probe.rb
"#;

impl Droplet {
    /// An app that runs `script` by bash: `app/main.sh`, with `bash main.sh` as its staged command.
    #[must_use]
    pub fn shell(script: &str) -> Self {
        Self::of(|tar| {
            for directory in ["./app/", "./logs/", "./tmp/"] {
                entry(tar, EntryType::Directory, directory, "", b"");
            }
            entry(
                tar,
                EntryType::Regular,
                "./app/main.sh",
                "",
                script.as_bytes(),
            );
            let staged = b"---\nstart_command: exec bash main.sh\n";
            entry(tar, EntryType::Regular, "./staging_info.yml", "", staged);
        })
    }

    /// An app that does what the first line of a connection to its port says: `try <address> <port>` says whether
    /// it can connect, `ask <address> <port>` what is answered to a datagram, `send <bytes>` sends so many, `take` reads to the
    /// end and says how many came, `echo` gives back each line.
    #[must_use]
    pub fn probe() -> Self {
        Self::shell(PROBE)
    }

    /// A sample app of `fixtures/apps`.
    #[must_use]
    pub fn sample(app: &str) -> Self {
        let out = std::env::temp_dir().join(format!("ostler-droplet-{app}-{}", std::process::id()));
        let pack = fixtures().join("apps/pack.sh");
        tool(&pack.to_string_lossy(), &[app, &out.to_string_lossy()]);
        let bytes = std::fs::read(&out).expect("pack.sh has written it");
        std::fs::remove_file(&out).expect("we just read it");
        Self(bytes)
    }

    fn of(fill: impl FnOnce(&mut Builder<GzEncoder<Vec<u8>>>)) -> Self {
        let mut tar = Builder::new(GzEncoder::new(Vec::new(), Compression::fast()));
        fill(&mut tar);
        Self(
            tar.into_inner()
                .and_then(GzEncoder::finish)
                .expect("memory does not fail"),
        )
    }

    /// A sleeper with one more entry, of the given kind (the letter of the tar format), name and link
    /// target, all written as they are: for hostile droplets.
    #[must_use]
    pub fn with_entry(kind: u8, name: &str, target: &str) -> Self {
        Self::of(|tar| {
            entry(tar, EntryType::Directory, "./app/", "", b"");
            entry(tar, EntryType::new(kind), name, target, b"");
            entry(
                tar,
                EntryType::Regular,
                "./staging_info.yml",
                "",
                b"start_command: sleep infinity\n",
            );
        })
    }

    /// Nothing but these entries, all empty: kind, name, link target.
    #[must_use]
    pub fn of_entries(entries: &[(u8, &str, &str)]) -> Self {
        Self::of(|tar| {
            for (kind, name, target) in entries {
                entry(tar, EntryType::new(*kind), name, target, b"");
            }
        })
    }

    /// These files in the home directory; a script (`#!`) can be executed.
    #[must_use]
    pub fn of_files(files: &[(&str, &str)]) -> Self {
        Self::of(|tar| {
            entry(tar, EntryType::Directory, "./app/", "", b"");
            for (path, text) in files {
                entry(tar, EntryType::Regular, path, "", text.as_bytes());
            }
        })
    }

    /// Lower-case hexadecimal SHA-1, what a start message's `sha1` holds.
    #[must_use]
    pub fn sha1(&self) -> String {
        hex(&Sha1::digest(&self.0))
    }

    /// Lower-case hexadecimal SHA-256.
    #[must_use]
    pub fn sha256(&self) -> String {
        hex(&Sha256::digest(&self.0))
    }
}

/// Appends one entry whose name and target are written as they are: `tar` itself refuses `..`.
fn entry(tar: &mut Builder<impl Write>, kind: EntryType, name: &str, target: &str, bytes: &[u8]) {
    let mut header = Header::new_gnu();
    header.set_entry_type(kind);
    let executable = kind.is_dir() || bytes.starts_with(b"#!");
    header.set_mode(if executable { 0o755 } else { 0o644 });
    header.set_size(bytes.len() as u64);
    if kind.is_character_special() || kind.is_block_special() {
        header.set_device_major(1).expect("gnu headers have it");
        header.set_device_minor(3).expect("gnu headers have it");
    }
    let old = header.as_old_mut();
    old.name[..name.len()].copy_from_slice(name.as_bytes());
    old.linkname[..target.len()].copy_from_slice(target.as_bytes());
    header.set_cksum();
    tar.append(&header, bytes).expect("memory does not fail");
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
