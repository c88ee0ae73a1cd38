//! The working memory of a pass: its buffers by name, made once and reused by later passes.

use std::sync::Arc;

use tangram_device::DeviceError;

use super::constants::Constants;
use super::lent::Lender;
use super::{Buffer, Launcher};

/// Defines a set of buffers that can be gone through in their order.
macro_rules! buffers {
    ($(#[$doc:meta])* $name:ident { $($(#[$field_doc:meta])* $field:ident: $type:ty,)* }) => {
        $(#[$doc])*
        pub(crate) struct $name { $($(#[$field_doc])* pub(crate) $field: $type,)* }

        impl Parts for $name {
            fn new(gpu: &Arc<dyn Launcher>) -> $name {
                $name { $($field: <$type as Parts>::new(gpu),)* }
            }

            fn each(&mut self, visit: &mut dyn FnMut(&mut Buffer)) {
                $(self.$field.each(visit);)*
            }

            fn places_into(&self, places: &mut Vec<(u64, usize)>) {
                $(self.$field.places_into(places);)*
            }
        }
    };
}

/// What consists of buffers.
trait Parts {
    fn new(gpu: &Arc<dyn Launcher>) -> Self;
    fn each(&mut self, visit: &mut dyn FnMut(&mut Buffer));
    /// Address and bytes of each.
    fn places_into(&self, places: &mut Vec<(u64, usize)>);
}

impl Parts for Buffer {
    fn new(gpu: &Arc<dyn Launcher>) -> Buffer {
        Buffer::new(gpu)
    }

    fn each(&mut self, visit: &mut dyn FnMut(&mut Buffer)) {
        visit(self);
    }

    fn places_into(&self, places: &mut Vec<(u64, usize)>) {
        places.push((self.address(), self.bytes()));
    }
}

impl Parts for Constants {
    fn new(gpu: &Arc<dyn Launcher>) -> Constants {
        Constants::new(gpu)
    }

    fn each(&mut self, visit: &mut dyn FnMut(&mut Buffer)) {
        visit(&mut self.buffer);
    }

    fn places_into(&self, places: &mut Vec<(u64, usize)>) {
        self.buffer.places_into(places);
    }
}

impl Parts for Lender {
    fn new(gpu: &Arc<dyn Launcher>) -> Lender {
        Lender::new(gpu)
    }

    fn each(&mut self, _: &mut dyn FnMut(&mut Buffer)) {}

    fn places_into(&self, _: &mut Vec<(u64, usize)>) {}
}

buffers! {
    /// Rows as products read them: f32, and operands in bf16 and f16 (with a factor per row).
    Operands {
        plain: Buffer,
        bf16: Buffer,
        f16: Buffer,
        scales: Buffer,
    }
}

buffers! {
    /// The working memory of a pass.
    Memory {
        tables: Buffer,
        blocks: Buffer,
        /// See [`super::early`].
        early: Buffer,
        early_on_host: Lender,
        /// Residual stream, `[rows, hidden]`.
        x: Buffer,
        /// Normalised input of a block.
        h: Operands,
        query: Buffer,
        query_f16: Buffer,
        key: Buffer,
        value: Buffer,
        /// Result of attention.
        attended: Operands,
        partials: Buffer,
        /// The activated inside of a feed-forward block.
        gate: Operands,
        up: Buffer,
        angles: Buffer,
        local_angles: Buffer,
        constants: Constants,
        /// A block of keys and values for rows of no sequence.
        padding: Buffer,
        /// The result of a block before it is added to the residual stream.
        block: Buffer,
        scores: Buffer,
        /// Experts of rows, their weights, and the tables of [`super::GroupArguments`].
        chosen: Buffer,
        route_weights: Buffer,
        gather: Buffer,
        route_places: Buffer,
        tiles: Buffer,
        expert_output: Buffer,
        /// Low-rank products.
        factors: Buffer,
        inner: Buffer,
        output: Buffer,
        /// What was found out about its rows: see [`super::select`].
        selection: Buffer,
    }
}

impl Memory {
    /// Empty buffers.
    pub(crate) fn new(gpu: &Arc<dyn Launcher>) -> Memory {
        Parts::new(gpu)
    }

    /// Address and bytes of each buffer.
    pub(crate) fn places(&self) -> Vec<(u64, usize)> {
        let mut places = Vec::new();
        self.places_into(&mut places);
        places
    }

    /// Bytes of each buffer.
    pub(crate) fn sizes(&self) -> Vec<usize> {
        self.places().into_iter().map(|(_, bytes)| bytes).collect()
    }

    /// Makes room for at least so many bytes in each buffer, and on the host for what goes through it.
    ///
    /// # Errors
    /// As [`Buffer::reserve`].
    pub(crate) fn reserve(&mut self, sizes: &[usize]) -> Result<(), DeviceError> {
        let (mut sizes, mut result) = (sizes.iter(), Ok(()));
        self.each(&mut |buffer| {
            if let (Ok(()), Some(&bytes)) = (&result, sizes.next()) {
                result = buffer.reserve(bytes).map(|_| ());
            }
        });
        self.early_on_host.reserve(self.early.bytes());
        result
    }
}
