//! Host memory of a node under ours: tensor groups by content, kept as `tangram_policy::HostRetention` says.
//!
//! Ranks nothing itself. A content's number is its tensor key.

use tangram_policy::{Event, HostRetention, TensorKey};

#[derive(Clone, Copy, Debug, Default)]
struct Content {
    bytes: u64,
    /// Devices of the node that have it.
    devices: u32,
}

/// Host memory and what is in it.
#[derive(Debug)]
pub(crate) struct HostTier {
    retention: HostRetention,
    free: u64,
    contents: Vec<Content>,
}

/// What has come and gone.
#[derive(Debug, Default)]
pub(crate) struct Changes {
    pub(crate) kept: Option<u32>,
    pub(crate) dropped: Vec<u32>,
}

impl HostTier {
    /// Nothing is in it.
    pub(crate) fn new(bytes: u64) -> HostTier {
        HostTier { retention: HostRetention::new(), free: bytes, contents: Vec::new() }
    }

    /// Whether it has a content.
    pub(crate) fn has(&self, content: u32) -> bool {
        self.retention.has(TensorKey(content))
    }

    /// A request uses a content at `now` seconds.
    pub(crate) fn used(&mut self, content: u32, bytes: u64, now: f64) {
        let index = content as usize;
        if self.contents.len() <= index {
            self.contents.resize(index + 1, Content::default());
        }
        let tensor = TensorKey(content);
        if self.contents[index].bytes == 0 {
            self.contents[index].bytes = bytes;
            self.retention.apply(Event::Catalogued { tensor, bytes, depth: 0.0 });
        }
        self.retention.apply(Event::Used { tensor, at: now });
    }

    /// What the absence of a content from a device costs when it comes from disk, and when it comes from here, in seconds.
    pub(crate) fn appraise(&mut self, content: u32, from_disk: f64, from_host: f64) {
        let tensor = TensorKey(content);
        self.retention.apply(Event::AppraisedFromHost { tensor, seconds: from_host });
        self.retention.apply(Event::Appraised { tensor, seconds: from_disk });
    }

    /// A device has a content, or has it no longer.
    pub(crate) fn set_on_device(&mut self, content: u32, there: bool) {
        let tensor = TensorKey(content);
        let Some(known) = self.contents.get_mut(content as usize) else { return };
        if there {
            known.devices += 1;
            self.retention.apply(Event::Fetched { tensor });
        } else {
            known.devices = known.devices.saturating_sub(1);
            if known.devices == 0 {
                self.retention.apply(Event::Evicted { tensor });
            }
        }
    }

    /// A content is read from disk, and stays here if that is worth what has to go.
    pub(crate) fn read(&mut self, content: u32) -> Changes {
        let (tensor, bytes) = (TensorKey(content), self.contents[content as usize].bytes);
        let size = |tensor: TensorKey| Some(self.contents[tensor.0 as usize].bytes);
        let room = self.retention.room(tensor, bytes.saturating_sub(self.free), size);
        let Some(victims) = room.filter(|_| !self.has(content)) else { return Changes::default() };
        for &tensor in &victims {
            self.free += self.contents[tensor.0 as usize].bytes;
            self.retention.apply(Event::Hosted { tensor, hosted: false });
        }
        self.free -= bytes;
        self.retention.apply(Event::Hosted { tensor, hosted: true });
        Changes { kept: Some(content), dropped: victims.into_iter().map(|tensor| tensor.0).collect() }
    }
}
