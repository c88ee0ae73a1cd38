//! Heads, cache and attention.

use super::*;

/// Positions of a partition, and tokens of a block, as in the sources.
const PARTITION: usize = 256;
const BLOCK_TOKENS: usize = 16;

/// Sequences with random keys and values in blocks.
struct Cache {
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
    /// Bytes of other layers before this one.
    layer_offset: usize,
    /// Per sequence: position of its first token in the batch, and its tokens.
    chunks: Vec<(usize, usize)>,
    /// Per sequence `[key or value][position][kv head][head_dim]`.
    values: Vec<[Vec<f32>; 2]>,
    blocks: Vec<Buffer>,
    addresses: Buffer,
    positions: Buffer,
    sequences: Buffer,
    first_block: Buffer,
    sequence_rows: Buffer,
    rows: usize,
}

impl Cache {
    /// Bytes of a layer's part of a block.
    fn layer_bytes(&self, element: usize) -> usize {
        2 * self.kv_heads * BLOCK_TOKENS * self.head_dim * element
    }
}

impl Bench {
    /// Sequences of up to `longest` positions. Positions that no token looks at hold NaN.
    fn cache(
        &mut self,
        heads: usize,
        kv_heads: usize,
        head_dim: usize,
        longest: usize,
        f32_cache: bool,
    ) -> Cache {
        let element = if f32_cache { 4 } else { 2 };
        let mut cache = Cache {
            heads,
            kv_heads,
            head_dim,
            layer_offset: 0,
            chunks: Vec::new(),
            values: Vec::new(),
            blocks: Vec::new(),
            addresses: self.output(1),
            positions: self.output(1),
            sequences: self.output(1),
            first_block: self.output(1),
            sequence_rows: self.output(1),
            rows: 0,
        };
        let layer_bytes = cache.layer_bytes(element);
        cache.layer_offset = layer_bytes * self.between(0, 2);
        let (mut positions, mut sequences) = (Vec::new(), Vec::new());
        let (mut first_block, mut sequence_rows) = (Vec::new(), Vec::new());
        for sequence in 0..self.between(1, 3) {
            let end = self.between(1, longest);
            let tokens = if self.chance(50) { 1 } else { self.between(1, end.min(70)) };
            let position = end - tokens;
            first_block.push(cache.blocks.len() as u32);
            sequence_rows.extend([cache.rows as u32, tokens as u32]);
            positions.extend((position..end).map(|position| position as u32));
            sequences.extend(std::iter::repeat_n(sequence as u32, tokens));
            cache.rows += tokens;
            cache.chunks.push((position, tokens));
            let width = kv_heads * head_dim;
            let mut values = [self.numbers(end * width, 1.0), self.numbers(end * width, 1.0)];
            if !f32_cache {
                let round = |value: &mut f32| *value = f16::from_f32(*value).to_f32();
                values.iter_mut().for_each(|values| values.iter_mut().for_each(round));
            }
            for block in 0..end.div_ceil(BLOCK_TOKENS) {
                let mut bytes = vec![0xff; cache.layer_offset + layer_bytes];
                for (of_values, values) in values.iter().enumerate() {
                    for token in 0..BLOCK_TOKENS.min(end - block * BLOCK_TOKENS) {
                        for head in 0..kv_heads {
                            let from = ((block * BLOCK_TOKENS + token) * kv_heads + head) * head_dim;
                            let to =
                                ((of_values * kv_heads + head) * BLOCK_TOKENS + token) * head_dim * element;
                            let dtype = if f32_cache { DType::F32 } else { DType::F16 };
                            let row = stored(&values[from..from + head_dim], dtype);
                            bytes[cache.layer_offset + to..][..row.len()].copy_from_slice(&row);
                        }
                    }
                }
                cache.blocks.push(self.upload(&bytes));
            }
            cache.values.push(values);
        }
        let addresses: Vec<u64> = cache.blocks.iter().map(Buffer::address).collect();
        cache.addresses = self.upload_u64(&addresses);
        cache.positions = self.upload_u32(&positions);
        cache.sequences = self.upload_u32(&sequences);
        cache.first_block = self.upload_u32(&first_block);
        cache.sequence_rows = self.upload_u32(&sequence_rows);
        cache
    }

    pub(super) fn check_attention(&mut self) {
        let head_dim = self.choose(&[8, 24, 32, 64, 64, 80, 96, 128, 128, 192, 256]);
        let size = launch::attention_size(head_dim).expect("a size");
        let kv_heads = self.between(1, 2);
        let group = self.choose(&[1, 1, 2, 3, 4, 7, 8, 16, 20]);
        let heads = kv_heads * group;
        let longest = 700.min(200 + 150 * self.scale);
        let cache = self.cache(heads, kv_heads, head_dim, longest, false);
        let window = if self.chance(40) { self.between(1, 300) } else { 0 };
        let cap = if self.chance(30) { 5.0 } else { 0.0 };
        let scale = 1.0 / (head_dim as f32).sqrt();
        let case =
            format!("{heads}/{kv_heads} heads of {head_dim}, {:?}, window {window}, cap {cap}", cache.chunks);
        let width = heads * head_dim;
        let queries = self.numbers(cache.rows * width, 1.5);
        let query = self.upload(&stored(&queries, DType::F16));
        let queries: Vec<f64> = queries.iter().map(|&value| f16::from_f32(value).to_f64()).collect();
        let expected = expected_attention(&cache, &queries, scale, cap, window, false);

        let together = group.min(16);
        let mut first: Option<Vec<u32>> = None;
        // With few and with many rows per block, and cut into partitions.
        for way in ["few", "many", "cut"] {
            let many = way == "many";
            let most = launch::attention_rows(size, many) / together;
            let (mut items, mut merges, mut row) = (Vec::new(), Vec::new(), 0);
            let mut slot = 0;
            for (sequence, &(position, tokens)) in cache.chunks.iter().enumerate() {
                if way == "cut" {
                    for token in 0..tokens {
                        let partitions = (position + token + 1).div_ceil(PARTITION);
                        merges.extend([(row + token) as u32, slot, partitions as u32]);
                        for partition in 0..partitions {
                            items.extend([(row + token) as u32, 1, sequence as u32, partition as u32, slot]);
                            slot += 1;
                        }
                    }
                } else {
                    for from in (0..tokens).step_by(most) {
                        let tokens = most.min(tokens - from) as u32;
                        items.extend([(row + from) as u32, tokens, sequence as u32, 0, u32::MAX]);
                    }
                }
                row += tokens;
            }
            // An item without tokens is skipped.
            items.extend([0; 5]);
            let out = self.output(cache.rows * width);
            let partials = self.output((slot as usize).max(1) * heads * (2 + head_dim));
            let on_gpu = self.upload_u32(&items);
            let arguments = AttendArguments {
                query: query.address(),
                out: out.address(),
                items: on_gpu.address(),
                positions: cache.positions.address(),
                blocks: cache.addresses.address(),
                first_block: cache.first_block.address(),
                partials: partials.address(),
                layer_offset: cache.layer_offset as u64,
                heads: heads as u32,
                kv_heads: kv_heads as u32,
                head_dim: head_dim as u32,
                window: window as u32,
                scale,
                cap,
            };
            // SAFETY: items are of rows, sequences and slots that exist.
            unsafe { self.kernels.attend(size, many, items.len() / 5, &arguments) }.expect("a launch");
            if way == "cut" {
                let on_gpu = self.upload_u32(&merges);
                let arguments = MergeArguments {
                    partials: partials.address(),
                    out: out.address(),
                    merges: on_gpu.address(),
                    heads: heads as u32,
                    head_dim: head_dim as u32,
                };
                // SAFETY: as above.
                unsafe { self.kernels.attend_merge(launch::heads(merges.len() / 3, heads), &arguments) }
                    .expect("a launch");
            }
            let found = self.read(&out, cache.rows * width);
            // Weights are rounded to f16.
            let expected = expected.iter().map(|&(value, size)| (value, 2e-3 * size + 1e-6));
            self.compare(&format!("{case}, {way}"), &found, expected);
            let first = first.get_or_insert_with(|| bits(&found));
            assert_eq!(*first, bits(&found), "{case}: {way} differs");
        }
    }

    pub(super) fn check_plain_attention(&mut self) {
        let head_dim = self.between(1, 70);
        let kv_heads = self.between(1, 3);
        let heads = kv_heads * self.between(1, 4);
        let f32_cache = self.chance(50);
        let fresh = self.chance(30);
        let cache = self.cache(heads, kv_heads, head_dim, if fresh { 60 } else { 300 }, f32_cache || fresh);
        // Without a cache sequences are whole: as many tokens as there are positions.
        let chunks: Vec<(usize, usize)> = cache
            .chunks
            .iter()
            .map(|&(position, tokens)| if fresh { (0, position + tokens) } else { (position, tokens) })
            .collect();
        let rows: usize = chunks.iter().map(|&(_, tokens)| tokens).sum();
        let window = if !fresh && self.chance(40) { self.between(1, 200) } else { 0 };
        let cap = if self.chance(30) { 5.0 } else { 0.0 };
        let scale = 0.2;
        let case =
            format!("{heads}/{kv_heads} heads of {head_dim}, {chunks:?}, fresh {fresh}, window {window}");
        let width = heads * head_dim;
        let queries = self.numbers(rows * width, 1.5);
        let query = self.upload_f32(&queries);
        let out = self.output(rows * width);
        let concat = |side: usize| -> Vec<f32> {
            cache.values.iter().flat_map(|values| values[side].iter().copied()).collect()
        };
        let (key, value) = (self.upload_f32(&concat(0)), self.upload_f32(&concat(1)));
        let mut sequence_rows = Vec::new();
        let (mut positions, mut sequences) = (Vec::new(), Vec::new());
        for (sequence, &(position, tokens)) in chunks.iter().enumerate() {
            sequence_rows.extend([positions.len() as u32, tokens as u32]);
            positions.extend((position..position + tokens).map(|position| position as u32));
            sequences.extend(std::iter::repeat_n(sequence as u32, tokens));
        }
        let tables = [positions, sequences, sequence_rows].map(|table| self.upload_u32(&table));
        let arguments = PlainAttendArguments {
            query: query.address(),
            out: out.address(),
            key: if fresh { key.address() } else { 0 },
            value: if fresh { value.address() } else { 0 },
            positions: tables[0].address(),
            sequences: tables[1].address(),
            blocks: cache.addresses.address(),
            first_block: cache.first_block.address(),
            sequence_rows: tables[2].address(),
            layer_offset: cache.layer_offset as u64,
            heads: heads as u32,
            kv_heads: kv_heads as u32,
            head_dim: head_dim as u32,
            window: window as u32,
            scale,
            cap,
            cache_f32: u32::from(f32_cache),
            bidirectional: u32::from(fresh),
        };
        // SAFETY: rows, sequences and blocks are there.
        unsafe { self.kernels.attend_plain(launch::attend_plain(rows, heads, head_dim), &arguments) }
            .expect("a launch");
        let found = self.read(&out, rows * width);
        let queries: Vec<f64> = queries.iter().map(|&value| f64::from(value)).collect();
        let cache = Cache { chunks, rows, ..cache };
        let expected = expected_attention(&cache, &queries, scale, cap, window, fresh);
        self.compare(&case, &found, expected.iter().map(|&(value, size)| (value, 1e-5 * size + 1e-6)));
    }

    pub(super) fn check_prepare(&mut self) {
        let head_dim = 2 * self.between(1, 70);
        let kv_heads = self.between(1, 3);
        let heads = kv_heads * self.between(1, 3);
        let half = self.between(0, head_dim / 2);
        let f32_cache = self.chance(50);
        let cached = self.chance(80);
        let cache = self.cache(heads, kv_heads, head_dim, 60, f32_cache);
        let rows = cache.rows;
        let case = format!("{heads}/{kv_heads} heads of {head_dim}, {half} pairs, {:?}", cache.chunks);
        let (query_width, key_width) = (heads * head_dim, kv_heads * head_dim);
        let x = [query_width, key_width, key_width].map(|width| self.numbers(rows * width, 2.0));
        let on_gpu = [0, 1, 2].map(|i| self.upload_f32(&x[i]));
        let narrow = self.upload(&vec![0xff; rows * query_width * 2]);
        let normed = self.chance(50);
        let norms = [self.vector(head_dim), self.vector(head_dim)];
        let (epsilon, offset) = (1e-5f32, if self.chance(50) { 1.0f32 } else { 0.0 });
        let frequencies: Vec<f32> = (0..half).map(|i| 1.0 / 1e4f32.powf(i as f32 / half as f32)).collect();
        let magnitude = 1.25f32;
        let angles = self.output(rows * half * 2 + 1);
        let of_frequencies = self.upload_f32(&[&frequencies[..], &[0.0]].concat());
        // Some rows are of long sequences.
        let (long_magnitude, factor) = (0.75f32, 0.5f32);
        let of_long: Vec<f32> = frequencies.iter().map(|frequency| frequency * factor).chain([0.0]).collect();
        let of_long = self.upload_f32(&of_long);
        let mut longs: Vec<u32> = (0..rows).map(|_| self.between(0, 1) as u32).collect();
        let of_longs = self.upload_u32(&longs);
        let with_longs = self.chance(50);
        if !with_longs {
            longs.fill(0);
        }
        let angle = AngleArguments {
            positions: cache.positions.address(),
            longs: if with_longs { of_longs.address() } else { 0 },
            frequencies: of_frequencies.address(),
            long_frequencies: of_long.address(),
            out: angles.address(),
            half: half as u32,
            magnitude,
            long_magnitude,
            unused: 0,
        };
        let arguments = PrepareArguments {
            query: on_gpu[0].address(),
            key: on_gpu[1].address(),
            value: on_gpu[2].address(),
            query_f16: narrow.address(),
            angles: angles.address(),
            query_norm: if normed { norms[0].0.address() } else { 0 },
            key_norm: if normed { norms[1].0.address() } else { 0 },
            positions: cache.positions.address(),
            sequences: cache.sequences.address(),
            blocks: if cached { cache.addresses.address() } else { 0 },
            first_block: cache.first_block.address(),
            layer_offset: cache.layer_offset as u64,
            heads: heads as u32,
            kv_heads: kv_heads as u32,
            head_dim: head_dim as u32,
            half: half as u32,
            query_norm_type: norms[0].1,
            key_norm_type: norms[1].1,
            epsilon,
            offset,
            cache_f32: u32::from(f32_cache),
            unused: 0,
        };
        let launch = Launch { grid: [rows as u32, 1, 1], threads: 64, shared_bytes: 0 };
        // SAFETY: rows, sequences and blocks are there.
        unsafe {
            self.kernels.angles(launch, &angle).expect("a launch");
            self.kernels.prepare(launch::heads(rows, 1), &arguments).expect("a launch");
        }
        let positions: Vec<usize> =
            cache.chunks.iter().flat_map(|&(position, tokens)| position..position + tokens).collect();
        let expected = |x: &[f32], norm: Option<&[f32]>| -> Vec<f64> {
            let heads_of_row = x.len() / rows / head_dim;
            x.chunks_exact(head_dim)
                .enumerate()
                .flat_map(|(index, head)| {
                    let mut y: Vec<f64> = head.iter().map(|&value| f64::from(value)).collect();
                    if let Some(norm) = norm {
                        let mean = y.iter().map(|value| value * value).sum::<f64>() / head_dim as f64;
                        let factor = 1.0 / (mean + f64::from(epsilon)).sqrt();
                        y.iter_mut()
                            .zip(norm)
                            .for_each(|(y, &w)| *y *= factor * (f64::from(w) + f64::from(offset)));
                    }
                    let row = index / heads_of_row;
                    let (factor, magnitude) =
                        if longs[row] == 1 { (factor, long_magnitude) } else { (1.0, magnitude) };
                    for i in 0..half {
                        let angle = f64::from(positions[row] as f32 * (frequencies[i] * factor));
                        let (c, s) = (angle.cos() * f64::from(magnitude), angle.sin() * f64::from(magnitude));
                        (y[i], y[i + half]) = (y[i] * c - y[i + half] * s, y[i + half] * c + y[i] * s);
                    }
                    y
                })
                .collect()
        };
        let norm = |i: usize| normed.then_some(&norms[i].2[..]);
        let (queries, keys) = (expected(&x[0], norm(0)), expected(&x[1], norm(1)));
        let bound = |value: &f64| (*value, 2e-5 * (1.0 + value.abs()));
        let found = self.read(&on_gpu[0], rows * query_width);
        self.compare(&format!("{case}: queries"), &found, queries.iter().map(bound));
        let narrowed: Vec<u16> = found.iter().map(|&value| f16::from_f32(value).to_bits()).collect();
        assert_eq!(self.read_u16(&narrow, rows * query_width), narrowed, "{case}");
        let found_keys = self.read(&on_gpu[1], rows * key_width);
        self.compare(&format!("{case}: keys"), &found_keys, keys.iter().map(bound));
        // The cache has what the rows have, and everything else as it was.
        let element = if f32_cache { 4 } else { 2 };
        let mut row = 0;
        let mut block = 0;
        for (&(position, tokens), values) in cache.chunks.iter().zip(&cache.values) {
            let end = position + tokens;
            for index in 0..end.div_ceil(BLOCK_TOKENS) {
                let mut bytes = vec![0; cache.layer_offset + cache.layer_bytes(element)];
                cache.blocks[block].read(&mut bytes).expect("a block");
                block += 1;
                for token in 0..BLOCK_TOKENS {
                    let at = index * BLOCK_TOKENS + token;
                    for (side, values) in values.iter().enumerate() {
                        for head in 0..kv_heads {
                            let place =
                                ((side * kv_heads + head) * BLOCK_TOKENS + token) * head_dim * element;
                            let found = &bytes[cache.layer_offset + place..][..head_dim * element];
                            let dtype = if f32_cache { DType::F32 } else { DType::F16 };
                            let expected = if at >= end {
                                vec![0xff; found.len()]
                            } else if at < position || !cached {
                                stored(&values[(at * kv_heads + head) * head_dim..][..head_dim], dtype)
                            } else {
                                let rows = if side == 0 { &found_keys } else { &x[2] };
                                let from = ((row + at - position) * kv_heads + head) * head_dim;
                                stored(&rows[from..from + head_dim], dtype)
                            };
                            assert_eq!(found, expected, "{case}: position {at}");
                        }
                    }
                }
            }
            row += tokens;
        }
    }
}

/// What attention gives, and the size of what is added up.
fn expected_attention(
    cache: &Cache,
    queries: &[f64],
    scale: f32,
    cap: f32,
    window: usize,
    bidirectional: bool,
) -> Vec<(f64, f64)> {
    let Cache { heads, kv_heads, head_dim, .. } = *cache;
    let mut out = Vec::new();
    let mut row = 0;
    for (&(position, tokens), values) in cache.chunks.iter().zip(&cache.values) {
        for token in 0..tokens {
            let limit = if bidirectional { tokens } else { position + token + 1 };
            let first = if window > 0 { limit.saturating_sub(window) } else { 0 };
            for head in 0..heads {
                let kv_head = head / (heads / kv_heads);
                let query = &queries[(row * heads + head) * head_dim..][..head_dim];
                let at =
                    |side: usize, p: usize| &values[side][(p * kv_heads + kv_head) * head_dim..][..head_dim];
                let scores: Vec<f64> = (first..limit)
                    .map(|p| {
                        let dot: f64 = query.iter().zip(at(0, p)).map(|(&q, &k)| q * f64::from(k)).sum();
                        let score = dot * f64::from(scale);
                        if cap == 0.0 { score } else { f64::from(cap) * (score / f64::from(cap)).tanh() }
                    })
                    .collect();
                let most = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                let weights: Vec<f64> = scores.iter().map(|score| (score - most).exp()).collect();
                let total: f64 = weights.iter().sum();
                for i in 0..head_dim {
                    let terms = weights.iter().zip(first..).map(|(w, p)| w / total * f64::from(at(1, p)[i]));
                    let (sum, size) =
                        terms.fold((0.0, 0.0), |(sum, size), term| (sum + term, size + term.abs()));
                    out.push((sum, size));
                }
            }
            row += 1;
        }
    }
    out
}
