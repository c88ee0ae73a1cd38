//! Host memory of a node under ours: tensor groups by content, kept as `tangram_policy::HostRetention` says.
//!
//! Ranks nothing itself. A content's number is its tensor key.

use tangram_policy::{Event, HostRetention, TensorKey};

/// Host memory and what is in it.
#[derive(Debug)]
pub(crate) struct HostTier {
    retention: HostRetention,
    free: u64,
    /// Bytes of each content that was ever used.
    bytes: Vec<u64>,
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
        HostTier { retention: HostRetention::new(), free: bytes, bytes: Vec::new() }
    }

    /// Bytes in it.
    #[cfg(test)]
    pub(crate) fn used_bytes(&self) -> u64 {
        (0..).zip(&self.bytes).filter(|&(content, _)| self.has(content)).map(|(_, bytes)| bytes).sum()
    }

    /// Whether it has a content.
    pub(crate) fn has(&self, content: u32) -> bool {
        self.retention.has(TensorKey(content))
    }

    /// A request uses a content at `now` seconds, which its device has already or has not.
    pub(crate) fn used(&mut self, content: u32, bytes: u64, found: bool, now: f64) {
        let index = content as usize;
        if self.bytes.len() <= index {
            self.bytes.resize(index + 1, 0);
        }
        let tensor = TensorKey(content);
        if self.bytes[index] == 0 {
            self.bytes[index] = bytes;
            self.retention.apply(Event::Catalogued { tensor, bytes, depth: 0.0 });
        }
        self.retention.apply(if found { Event::Fetched { tensor } } else { Event::Evicted { tensor } });
        self.retention.apply(Event::Leased { tensor, at: now });
    }

    /// A content leaves a device.
    pub(crate) fn left(&mut self, content: u32) {
        self.retention.apply(Event::Evicted { tensor: TensorKey(content) });
    }

    /// What the absence of a content from a device costs when it comes from disk, and when it comes from here, in seconds.
    pub(crate) fn appraise(&mut self, content: u32, from_disk: f64, from_host: f64) {
        let tensor = TensorKey(content);
        self.retention.apply(Event::AppraisedFromHost { tensor, seconds: from_host });
        self.retention.apply(Event::Appraised { tensor, seconds: from_disk });
    }

    /// A content is read from disk, and stays here if that is worth what has to go.
    pub(crate) fn read(&mut self, content: u32) -> Changes {
        let (tensor, bytes) = (TensorKey(content), self.bytes[content as usize]);
        let size = |tensor: TensorKey| Some(self.bytes[tensor.0 as usize]);
        let room = self.retention.room(tensor, bytes.saturating_sub(self.free), size);
        let Some(victims) = room.filter(|_| !self.has(content)) else { return Changes::default() };
        for &tensor in &victims {
            self.free += self.bytes[tensor.0 as usize];
            self.retention.apply(Event::Hosted { tensor, hosted: false });
        }
        self.free -= bytes;
        self.retention.apply(Event::Hosted { tensor, hosted: true });
        Changes { kept: Some(content), dropped: victims.into_iter().map(|tensor| tensor.0).collect() }
    }
}
