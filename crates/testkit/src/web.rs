//! A web server on threads that misbehaves as told: each connection serves requests until a fault ends it. Knows
//! ranges, `If-Match`, redirects and one credential.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use rand::rngs::Xoshiro256PlusPlus;
use rand::{RngExt, SeedableRng};

/// An object of the server.
#[derive(Clone)]
pub struct Served {
    /// Its bytes.
    pub bytes: Arc<Vec<u8>>,
    /// Its entity tag.
    pub etag: Option<String>,
    /// Further headers of every answer about it.
    pub headers: Vec<(String, String)>,
}

/// What goes wrong with an answer.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Fault {
    /// Nothing.
    None,
    /// The connection is closed before the answer, or in the middle of it.
    Reset,
    /// Nothing more is sent, but the connection stays.
    Stall,
    /// A status that may go away.
    Unavailable,
    /// `Content-Length` is one less than what belongs there.
    WrongLength,
    /// The answer is of a shorter range than was asked for, and says so.
    ShortRange,
    /// The answer is of another range than was asked for, and says so.
    OtherRange,
    /// The whole object instead of a range.
    Whole,
    /// More bytes than were asked for, without a length.
    TooLong,
    /// Something that is not HTTP.
    Noise,
    /// Other bytes of the right length.
    WrongBytes,
}

const FAULTS: [Fault; 9] = [
    Fault::Reset,
    Fault::Stall,
    Fault::Unavailable,
    Fault::WrongLength,
    Fault::ShortRange,
    Fault::OtherRange,
    Fault::Whole,
    Fault::TooLong,
    Fault::Noise,
];

/// Gives the fault of an answer by path and first and last byte of the range.
type Chooser = Box<dyn FnMut(&str, Option<(u64, u64)>) -> Fault + Send>;

/// What a server serves and what it has seen; can be changed while it runs.
pub struct State {
    /// Objects by path.
    pub objects: Mutex<BTreeMap<String, Served>>,
    chooser: Mutex<Chooser>,
    /// Bytes of bodies that were sent.
    pub sent: AtomicU64,
    /// Request heads as they came.
    pub requests: Mutex<Vec<String>>,
    /// Paths that are answered by a redirect.
    pub redirects: Mutex<BTreeMap<String, String>>,
    /// A path, and what `Authorization` must be for it and all below it.
    pub protected: Mutex<Option<(String, String)>>,
    /// Pause after each 16 KiB.
    pub pace: Mutex<Duration>,
}

/// A running server; it ends with its process.
pub struct Server {
    /// Where it listens.
    pub address: SocketAddr,
    /// What it serves.
    pub state: Arc<State>,
}

impl Server {
    /// Starts on a free port of this machine, without faults.
    pub fn start() -> Server {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let state = Arc::new(State {
            objects: Mutex::default(),
            chooser: Mutex::new(Box::new(|_, _| Fault::None)),
            sent: AtomicU64::new(0),
            requests: Mutex::default(),
            redirects: Mutex::default(),
            protected: Mutex::default(),
            pace: Mutex::default(),
        });
        let served = state.clone();
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let state = served.clone();
                std::thread::spawn(move || serve(&stream, &state));
            }
        });
        Server { address, state }
    }

    /// The address of a path.
    pub fn url(&self, path: &str) -> String {
        format!("http://{}{path}", self.address)
    }

    /// Serves these bytes under a path, with a tag made of them.
    pub fn put(&self, path: &str, bytes: &[u8]) {
        self.put_with(path, bytes, &[]);
    }

    /// As [`Server::put`], with further headers.
    pub fn put_with(&self, path: &str, bytes: &[u8], headers: &[(&str, &str)]) {
        let etag = Some(format!(
            "\"{:016x}\"",
            bytes.iter().fold(7u64, |h, &b| h.wrapping_mul(31).wrapping_add(b.into()))
        ));
        let headers = headers.iter().map(|(name, value)| (name.to_string(), value.to_string())).collect();
        let served = Served { bytes: Arc::new(bytes.to_vec()), etag, headers };
        self.state.objects.lock().unwrap().insert(path.to_owned(), served);
    }

    /// Chooses the fault of each answer, by path and first and last byte of the range.
    pub fn faults(&self, chooser: impl FnMut(&str, Option<(u64, u64)>) -> Fault + Send + 'static) {
        *self.state.chooser.lock().unwrap() = Box::new(chooser);
    }

    /// A fault in this share of the answers, by a seed.
    pub fn random_faults(&self, seed: u64, share: f64) {
        let mut rng = Xoshiro256PlusPlus::seed_from_u64(seed);
        self.faults(move |_, _| match rng.random_bool(share) {
            true => FAULTS[rng.random_range(0..FAULTS.len())],
            false => Fault::None,
        });
    }
}

fn serve(stream: &TcpStream, state: &State) -> Option<()> {
    let mut reader = BufReader::new(stream);
    loop {
        let (mut head, mut line) = (String::new(), String::new());
        while reader.read_line(&mut line).ok()? > 0 && line != "\r\n" {
            head.push_str(&line);
            line.clear();
        }
        if head.is_empty() {
            return None;
        }
        state.requests.lock().unwrap().push(head.clone());
        answer(stream, state, &head)?;
    }
}

/// Answers one request; `None` ends the connection.
fn answer(mut stream: &TcpStream, state: &State, head: &str) -> Option<()> {
    let path = head.split(' ').nth(1)?.split('?').next()?.to_owned();
    let header = |name: &str| {
        head.lines().skip(1).find_map(|line| {
            let (key, value) = line.split_once(':')?;
            key.eq_ignore_ascii_case(name).then(|| value.trim().to_owned())
        })
    };
    let mut plain = |status: &str, more: &str| {
        stream.write_all(format!("HTTP/1.1 {status}\r\n{more}content-length: 0\r\n\r\n").as_bytes()).ok()
    };
    if let Some((below, credential)) = &*state.protected.lock().unwrap()
        && path.starts_with(below)
        && header("authorization").as_ref() != Some(credential)
    {
        return plain("401 Unauthorized", "");
    }
    if let Some(to) = state.redirects.lock().unwrap().get(&path) {
        let mut more = format!("location: {to}\r\n");
        if let Some(served) = state.objects.lock().unwrap().get(&path) {
            more.extend(served.headers.iter().map(|(name, value)| format!("{name}: {value}\r\n")));
        }
        return plain("302 Found", &more);
    }
    let Some(served) = state.objects.lock().unwrap().get(&path).cloned() else {
        return plain("404 Not Found", "");
    };
    if header("if-match").is_some_and(|wanted| Some(wanted) != served.etag) {
        return plain("412 Precondition Failed", "");
    }
    let size = served.bytes.len() as u64;
    let range = header("range").and_then(|range| {
        let (first, last) = range.strip_prefix("bytes=")?.split_once('-')?;
        Some((first.parse::<u64>().ok()?, last.parse::<u64>().ok()?.min(size.saturating_sub(1))))
    });
    if range.is_some_and(|(first, _)| first >= size) {
        return plain("416 Range Not Satisfiable", &format!("content-range: bytes */{size}\r\n"));
    }
    let fault = (state.chooser.lock().unwrap())(&path, range);
    let range = match fault {
        Fault::Whole => None,
        Fault::ShortRange => range.map(|(first, last)| (first, first + (last - first) / 2)),
        Fault::OtherRange => range.map(|(first, last)| {
            (first.saturating_sub(1), last.saturating_sub(1).max(first.saturating_sub(1)))
        }),
        _ => range,
    };
    let (first, last) = range.unwrap_or((0, size.saturating_sub(1)));
    let mut body =
        served.bytes.get(first as usize..(last + 1).min(size) as usize).unwrap_or_default().to_vec();
    match fault {
        Fault::Unavailable => return plain("503 Service Unavailable", "retry-after: 0\r\n"),
        Fault::Noise => {
            let _ = stream.write_all(b"\x16\x03\x01 this is not the protocol\r\n\r\n");
            return None;
        }
        Fault::WrongBytes => body.iter_mut().for_each(|byte| *byte ^= 0x55),
        _ => {}
    }
    let mut answer = match range {
        Some(_) => format!("HTTP/1.1 206 Partial Content\r\ncontent-range: bytes {first}-{last}/{size}\r\n"),
        None => "HTTP/1.1 200 OK\r\n".to_owned(),
    };
    let length = body.len() - usize::from(fault == Fault::WrongLength && !body.is_empty());
    match fault {
        Fault::TooLong => answer.push_str("connection: close\r\n"),
        _ => answer.push_str(&format!("content-length: {length}\r\n")),
    }
    if let Some(etag) = &served.etag {
        answer.push_str(&format!("etag: {etag}\r\n"));
    }
    for (name, value) in &served.headers {
        answer.push_str(&format!("{name}: {value}\r\n"));
    }
    answer.push_str("\r\n");
    stream.write_all(answer.as_bytes()).ok()?;
    let stop = match fault {
        Fault::Reset | Fault::Stall => body.len() / 2,
        _ => body.len(),
    };
    if fault == Fault::TooLong {
        body.extend([1; 100]);
    }
    let stop = if fault == Fault::TooLong { body.len() } else { stop };
    let pace = *state.pace.lock().unwrap();
    for piece in body[..stop].chunks(16 << 10) {
        stream.write_all(piece).ok()?;
        state.sent.fetch_add(piece.len() as u64, Ordering::Relaxed);
        std::thread::sleep(pace);
    }
    match fault {
        Fault::None | Fault::ShortRange | Fault::OtherRange | Fault::Whole | Fault::WrongBytes => Some(()),
        Fault::Stall => {
            std::thread::sleep(Duration::from_secs(5));
            None
        }
        _ => None,
    }
}

impl Server {
    /// Serves every file of a folder, and of those in it, below a path.
    pub fn put_folder(&self, path: &str, folder: &std::path::Path) {
        for entry in std::fs::read_dir(folder).unwrap() {
            let entry = entry.unwrap().path();
            let name = format!("{path}/{}", entry.file_name().unwrap().to_str().unwrap());
            match entry.is_dir() {
                true => self.put_folder(&name, &entry),
                false => self.put(&name, &std::fs::read(&entry).unwrap()),
            }
        }
    }
}
