//! Functions of rows, low-rank products, sampling.

use super::*;

impl Bench {
    pub(super) fn check_embed(&mut self) {
        for dtype in WEIGHT_TYPES {
            let block = (dtype.block_elements() as usize).max(1);
            let width = if block == 1 { self.between(1, 100) } else { block * self.between(1, 2) };
            let (vocab, rows) = (self.between(1, 30), self.between(1, 10));
            let (bytes, values) = self.weights(dtype, vocab * width);
            let tokens: Vec<u32> = (0..rows).map(|_| self.between(0, vocab - 1) as u32).collect();
            let positions: Vec<u32> = (0..rows).map(|_| self.between(0, 20) as u32).collect();
            let with = self.chance(50);
            let (position_table, position_type, of_position) = self.vector(23 * width);
            let (type_table, type_type, of_type) = self.vector(2 * width);
            let types: Vec<u32> = (0..rows).map(|_| self.between(0, 1) as u32).collect();
            let several_types = self.chance(50);
            let scale = 2.5f32;
            let out = self.output(rows * width);
            let [position_bytes, type_bytes] =
                [position_type, type_type].map(|dtype| width * if dtype == 0 { 4 } else { 2 });
            let table = self.upload(&bytes);
            let (on_gpu, of_positions) = (self.upload_u32(&tokens), self.upload_u32(&positions));
            let of_types = self.upload_u32(&types);
            let arguments = EmbedArguments {
                tokens: on_gpu.address(),
                positions: of_positions.address(),
                types: if several_types { of_types.address() } else { 0 },
                token_table: table.address(),
                position_table: if with { position_table.address() } else { 0 },
                type_table: if with { type_table.address() } else { 0 },
                out: out.address(),
                token_type: weight_type(dtype),
                position_type,
                type_type,
                width: width as u32,
                token_bytes: (bytes.len() / vocab) as u64,
                position_bytes: position_bytes as u64,
                type_bytes: type_bytes as u64,
                scale,
                position_offset: 2,
            };
            // SAFETY: tokens and positions are rows of the tables.
            unsafe { self.kernels.embed(launch::rows(rows, 256), &arguments) }.expect("a launch");
            let found = self.read(&out, rows * width);
            let expected: Vec<(f64, f64)> = (0..rows * width)
                .map(|index| {
                    let (row, i) = (index / width, index % width);
                    let mut sum = f64::from(values[tokens[row] as usize * width + i]) * f64::from(scale);
                    let mut size = sum.abs();
                    if with {
                        let of_row = if several_types { types[row] as usize } else { 0 };
                        let others = [
                            of_type[of_row * width + i],
                            of_position[(positions[row] as usize + 2) * width + i],
                        ];
                        sum += others.iter().map(|&other| f64::from(other)).sum::<f64>();
                        size += others.iter().map(|&other| f64::from(other.abs())).sum::<f64>();
                    }
                    (sum, 1e-6 * size + 1e-12)
                })
                .collect();
            self.compare(&format!("{dtype}, {rows} rows of {width}"), &found, expected);
        }
    }

    pub(super) fn check_norm(&mut self) {
        let (rows, width) = (self.between(1, 6), self.between(1, 400 * self.scale));
        let (centred, gathered, summed, accumulate) =
            (self.chance(50), self.chance(30), self.chance(30), self.chance(30));
        let case = format!("{rows}x{width}, centred {centred}, {gathered} {summed} {accumulate}");
        let x = self.numbers(rows * width, 2.0);
        let addend = self.numbers(rows * width, 1.0);
        let before = self.numbers(rows * width, 1.0);
        // Every row once, so that a row is not summed twice.
        let gather: Vec<u32> = (0..rows as u32).rev().collect();
        let (weight, weight_type, weights) = self.vector(width);
        let (bias, bias_type, biases) = self.vector(width);
        let (epsilon, offset) = (1e-5f32, 1.0f32);
        let padded = width.next_multiple_of(32);
        let on_gpu = self.upload_f32(&x);
        let (of_addend, of_gather) = (self.upload_f32(&addend), self.upload_u32(&gather));
        let out = if accumulate { self.upload_f32(&before) } else { self.output(rows * width) };
        let narrow = self.upload(&vec![0xff; rows * padded * 2]);
        let arguments = NormArguments {
            x: on_gpu.address(),
            addend: if summed { of_addend.address() } else { 0 },
            gather: if gathered { of_gather.address() } else { 0 },
            weight: weight.address(),
            bias: if centred { bias.address() } else { 0 },
            out: RowsOut { plain: out.address(), bf16: narrow.address(), ..RowsOut::default() },
            width: width as u32,
            weight_type,
            bias_type,
            centred: u32::from(centred),
            epsilon,
            offset,
            accumulate: u32::from(accumulate),
            unused: 0,
        };
        // SAFETY: all buffers have `rows` rows.
        unsafe { self.kernels.normalise(launch::rows(rows, 256), &arguments) }.expect("a launch");
        let found = self.read(&out, rows * width);
        let mut expected = Vec::new();
        for row in 0..rows {
            let from = if gathered { gather[row] as usize } else { row };
            let mut y: Vec<f64> = (0..width)
                .map(|i| {
                    let sum = x[from * width + i] + if summed { addend[from * width + i] } else { 0.0 };
                    f64::from(sum)
                })
                .collect();
            if centred {
                let mean = y.iter().sum::<f64>() / width as f64;
                y.iter_mut().for_each(|value| *value -= mean);
            }
            let square = y.iter().map(|value| value * value).sum::<f64>() / width as f64;
            let factor = 1.0 / (square + f64::from(epsilon)).sqrt();
            expected.extend((0..width).map(|i| {
                let mut value = y[i] * factor * f64::from(weights[i] + offset);
                value += if centred { f64::from(biases[i]) } else { 0.0 };
                value += if accumulate { f64::from(before[row * width + i]) } else { 0.0 };
                // Rounding of the mean shows most where almost nothing is left.
                (value, 3e-5 * (1.0 + value.abs()) * (1.0 + factor))
            }));
        }
        self.compare(&case, &found, expected);
        for (index, bits) in self.read_u16(&narrow, rows * padded).into_iter().enumerate() {
            let (row, i) = (index / padded, index % padded);
            let plain = if i < width { found[row * width + i] } else { 0.0 };
            assert_eq!(bits, bf16::from_f32(plain).to_bits(), "{case}");
        }
    }

    pub(super) fn check_activation(&mut self) {
        for activation in 0..=activation::NONE {
            let (rows, width) = (self.between(1, 4), self.between(1, 700));
            let gated = activation <= activation::GELU_TANH_GATE;
            let x = self.numbers(rows * width, 3.0);
            let up = self.numbers(rows * width, 1.0);
            let (on_gpu, of_up) = (self.upload_f32(&x), self.upload_f32(&up));
            let arguments = ActivateArguments {
                x: on_gpu.address(),
                up: if gated { of_up.address() } else { 0 },
                out: RowsOut { plain: on_gpu.address(), ..RowsOut::default() },
                width: width as u32,
                activation,
                ..ActivateArguments::default()
            };
            // SAFETY: all buffers have `rows` rows.
            unsafe { self.kernels.activate(launch::rows(rows, 512), &arguments) }.expect("a launch");
            let found = self.read(&on_gpu, rows * width);
            let expected = x.iter().zip(&up).map(|(&x, &up)| {
                let x = f64::from(x);
                let tanh = (0.797_884_560_802_865_4 * (x + 0.044715 * x * x * x)).tanh();
                let value = match activation {
                    activation::SILU_GATE => x / (1.0 + (-x).exp()),
                    activation::GELU_TANH_GATE | activation::GELU_TANH => 0.5 * x * (1.0 + tanh),
                    activation::GELU => 0.5 * x * (1.0 + erf(x / 2f64.sqrt())),
                    activation::RELU => x.max(0.0),
                    activation::TANH => x.tanh(),
                    activation::SIGMOID => 1.0 / (1.0 + (-x).exp()),
                    _ => x,
                };
                let factor = if gated { f64::from(up) } else { 1.0 };
                (value * factor, 2e-6 * (1.0 + x.abs()) * (0.01 + factor.abs()))
            });
            self.compare(&format!("activation {activation}"), &found, expected.collect::<Vec<_>>());
        }
    }

    pub(super) fn check_elements(&mut self) {
        let count = self.between(1, 2000);
        let (x, y) = (self.numbers(count, 4.0), self.numbers(count, 1.0));
        let (of_x, of_y) = (self.upload_f32(&x), self.upload_f32(&y));
        let add = AddArguments { x: of_x.address(), y: of_y.address(), elements: count as u64 };
        let cap = CapArguments { x: of_y.address(), elements: count as u64, cap: 0.7, unused: 0 };
        // SAFETY: both have so many elements.
        unsafe {
            self.kernels.add(launch::elements(count), &add).expect("a launch");
            self.kernels.cap(launch::elements(count), &cap).expect("a launch");
        }
        let sums: Vec<f32> = x.iter().zip(&y).map(|(x, y)| x + y).collect();
        assert_eq!(bits(&self.read(&of_x, count)), bits(&sums));
        let found = self.read(&of_y, count);
        let cap = f64::from(0.7f32);
        let expected = y.iter().map(|&y| (cap * (f64::from(y) / cap).tanh(), 1e-6)).collect::<Vec<_>>();
        self.compare("cap", &found, expected);
    }

    pub(super) fn check_pool(&mut self) {
        let (sequences, width) = (self.between(1, 4), self.between(1, 300));
        let lengths: Vec<usize> = (0..sequences).map(|_| self.between(1, 9)).collect();
        let rows: usize = lengths.iter().sum();
        let x = self.numbers(rows * width, 1.0);
        let (mean, unit) = (self.chance(50), self.chance(50));
        let mut table = Vec::new();
        let mut row = 0;
        for &length in &lengths {
            table.extend([row as u32, length as u32]);
            row += length;
        }
        let (on_gpu, of_table, out) =
            (self.upload_f32(&x), self.upload_u32(&table), self.output(sequences * width));
        let arguments = PoolArguments {
            x: on_gpu.address(),
            sequences: of_table.address(),
            out: out.address(),
            width: width as u32,
            mean: u32::from(mean),
            unit_length: u32::from(unit),
            unused: 0,
        };
        // SAFETY: sequences are of rows of x.
        unsafe { self.kernels.pool(launch::rows(sequences, 256), &arguments) }.expect("a launch");
        let found = self.read(&out, sequences * width);
        let mut expected = Vec::new();
        for (sequence, &length) in lengths.iter().enumerate() {
            let first = table[2 * sequence] as usize;
            let count = if mean { length } else { 1 };
            let mut y: Vec<f64> = (0..width)
                .map(|i| {
                    (first..first + count).map(|row| f64::from(x[row * width + i])).sum::<f64>()
                        / count as f64
                })
                .collect();
            let long = y.iter().map(|value| value * value).sum::<f64>().sqrt().max(1e-12);
            y.iter_mut().for_each(|value| *value /= if unit { long } else { 1.0 });
            let factor = if unit { 1.0 + 1.0 / long } else { 1.0 };
            expected.extend(y.iter().map(|&value| (value, 5e-6 * (1.0 + value.abs()) * factor)));
        }
        self.compare(&format!("{lengths:?} of {width}, mean {mean}"), &found, expected);
    }

    pub(super) fn check_low_rank(&mut self) {
        let (rows, columns, width) = (self.between(1, 8), self.between(1, 200), self.between(1, 600));
        let adapters = self.between(1, 3);
        let x = self.numbers(rows * columns, 1.0);
        let before = self.numbers(rows * width, 1.0);
        let of_row: Vec<Option<usize>> =
            (0..rows).map(|_| self.chance(80).then(|| self.between(0, adapters - 1))).collect();
        let mut table = Vec::new();
        let mut factors = Vec::new();
        for _ in 0..adapters {
            let rank = self.between(1, 20);
            let (a, b) = (self.vector(rank * columns), self.vector(rank * width));
            let has = self.chance(80);
            table.extend(
                if has { [a.0.address(), b.0.address()] } else { [0; 2] }
                    .iter()
                    .flat_map(|v| v.to_le_bytes()),
            );
            table.extend([a.1, b.1, rank as u32].iter().flat_map(|v| v.to_le_bytes()));
            table.extend(0.5f32.to_le_bytes());
            factors.push((has, rank, a, b));
        }
        let most_rank = factors.iter().map(|factors| factors.1).max().unwrap_or(1);
        let slots: Vec<u32> = of_row.iter().map(|slot| slot.map_or(u32::MAX, |slot| slot as u32)).collect();
        let (on_gpu, out, inner) =
            (self.upload_f32(&x), self.upload_f32(&before), self.output(rows * most_rank));
        let (of_slots, of_table) = (self.upload_u32(&slots), self.upload(&table));
        let arguments = LowRankArguments {
            x: on_gpu.address(),
            inner: inner.address(),
            out: out.address(),
            adapters: of_slots.address(),
            factors: of_table.address(),
            columns: columns as u32,
            width: width as u32,
            most_rank: most_rank as u32,
            unused: 0,
        };
        // SAFETY: all buffers have their rows, and factors their ranks.
        unsafe {
            self.kernels.low_rank_shrink(launch::low_rank(rows, most_rank, 8), &arguments).expect("a launch");
            self.kernels.low_rank_expand(launch::low_rank(rows, width, 256), &arguments).expect("a launch");
        }
        let found = self.read(&out, rows * width);
        let mut expected = Vec::new();
        for row in 0..rows {
            let of_adapter = of_row[row].map(|slot| &factors[slot]).filter(|factors| factors.0);
            let inner: Vec<f64> = of_adapter.map_or(Vec::new(), |(_, rank, a, _)| {
                let dot = |j: usize| {
                    (0..columns)
                        .map(|k| f64::from(a.2[j * columns + k]) * f64::from(x[row * columns + k]))
                        .sum::<f64>()
                };
                (0..*rank).map(|j| 0.5 * dot(j)).collect()
            });
            for n in 0..width {
                let update: f64 = of_adapter.map_or(0.0, |(_, _, _, b)| {
                    inner.iter().enumerate().map(|(j, inner)| inner * f64::from(b.2[j * width + n])).sum()
                });
                expected.push((f64::from(before[row * width + n]) + update, 3e-4));
            }
        }
        self.compare(&format!("{rows} rows, {columns} to {width}"), &found, expected);
    }

    pub(super) fn check_sampling(&mut self) {
        let (rows, vocab) = (self.between(1, 3), self.between(1, 5000));
        let wanted = self.between(1, vocab.min(launch::MOST_CANDIDATES));
        // Half of the time few different numbers, so that many are equal.
        let mut logits = self.numbers(rows * vocab, 5.0);
        if self.chance(50) {
            logits.iter_mut().for_each(|logit| *logit = logit.round());
        }
        let words = vocab.div_ceil(32);
        let masks: Vec<u32> = (0..words).map(|_| self.random.next_u32() | 1).collect();
        let mut adjustments = Vec::new();
        let mut changed = logits.clone();
        for token in (0..vocab).step_by(7) {
            let [bias, frequency, presence] = [1.5f32, 0.25, -0.5];
            let repetition = self.choose(&[1.0f32, 1.5]);
            adjustments.extend([0, token as u32].iter().flat_map(|v| v.to_le_bytes()));
            adjustments.extend([bias, repetition, frequency, presence].iter().flat_map(|v| v.to_le_bytes()));
            let logit = &mut changed[token];
            *logit += bias;
            *logit = if *logit > 0.0 { *logit / repetition } else { *logit * repetition };
            *logit -= frequency;
            *logit -= presence;
        }
        let count = adjustments.len() / 24;
        let masked = rows - 1;
        for token in 0..vocab {
            if masks[token / 32] >> (token % 32) & 1 == 0 {
                changed[masked * vocab + token] = f32::NEG_INFINITY;
            }
        }
        let (on_gpu, of_adjustments) = (self.upload_f32(&logits), self.upload(&adjustments));
        let (of_rows, of_masks) = (self.upload_u32(&[masked as u32]), self.upload_u32(&masks));
        let adjust = AdjustArguments {
            logits: on_gpu.address(),
            adjustments: of_adjustments.address(),
            count: count as u32,
            vocab: vocab as u32,
        };
        let mask = MaskArguments {
            logits: on_gpu.address(),
            rows: of_rows.address(),
            masks: of_masks.address(),
            vocab: vocab as u32,
            unused: 0,
        };
        let temperature = 0.8f32;
        let of_temperatures = self.upload_f32(&vec![temperature; rows]);
        let share = self.between(0, 999) as f64 / 1000.0;
        let of_randoms = self.upload(&share.to_le_bytes().repeat(rows));
        let (out, totals) = (self.output(rows * wanted * 2), self.output(rows * 2));
        let drawn = self.output(rows * 6);
        let candidates = CandidatesArguments {
            logits: on_gpu.address(),
            candidates: out.address(),
            totals: totals.address(),
            temperatures: of_temperatures.address(),
            randoms: of_randoms.address(),
            drawn: drawn.address(),
            vocab: vocab as u32,
            wanted: wanted as u32,
        };
        // SAFETY: all buffers have their rows, tokens and entries.
        unsafe {
            self.kernels.adjust_logits(launch::elements(count), &adjust).expect("a launch");
            self.kernels.mask_logits(launch::mask(vocab, 1), &mask).expect("a launch");
            self.kernels.candidates(launch::candidates(rows), &candidates).expect("a launch");
        }
        assert_eq!(bits(&self.read(&on_gpu, rows * vocab)), bits(&changed), "{rows}x{vocab}");
        let found = self.read_u32(&out, rows * wanted * 2);
        let mut bytes = vec![0; rows * 8];
        totals.read(&mut bytes).expect("a result");
        let mut of_drawn = vec![0; rows * 24];
        drawn.read(&mut of_drawn).expect("a result");
        for (row, drawn) in of_drawn.as_chunks::<24>().0.iter().enumerate() {
            let logits = &changed[row * vocab..(row + 1) * vocab];
            let mut order: Vec<usize> = (0..vocab).collect();
            order.sort_by(|&a, &b| logits[b].total_cmp(&logits[a]).then(a.cmp(&b)));
            for (place, &token) in order[..wanted].iter().enumerate() {
                let found = &found[(row * wanted + place) * 2..][..2];
                assert_eq!(
                    found,
                    [token as u32, logits[token].to_bits()],
                    "{rows}x{vocab}, place {place} of {wanted}"
                );
            }
            let highest = logits[order[0]];
            let total: f64 =
                logits.iter().map(|&logit| (f64::from(logit - highest) / f64::from(temperature)).exp()).sum();
            let found = f64::from_le_bytes(bytes.as_chunks().0[row]);
            assert!((found - total).abs() <= 1e-5 * total, "{found} {total}");
            let weight = |token: usize| (f64::from(logits[token] - highest) / f64::from(temperature)).exp();
            let [token, below, upto] = drawn.as_chunks::<8>().0 else { unreachable!("24 bytes") };
            let (token, below, upto) = (
                u64::from_le_bytes(*token) as u32 as usize,
                f64::from_le_bytes(*below),
                f64::from_le_bytes(*upto),
            );
            let before: f64 = (0..token).map(weight).sum();
            assert!((below - before).abs() <= 1e-5 * total, "{below} before token {token}, not {before}");
            assert!((upto - before - weight(token)).abs() <= 1e-5 * total, "{upto} up to token {token}");
            let target = share * total;
            let misses = (below - target).max(target - upto);
            assert!(misses <= 1e-5 * total, "{target} of {total} is not between {below} and {upto}");
        }
    }
}

/// The error function, by its series and its continued fraction.
fn erf(x: f64) -> f64 {
    let z = x.abs();
    if z > 6.0 {
        return x.signum();
    }
    // Σ (−1)^n z^(2n+1) / (n! (2n+1)) loses digits for large z; the series with e^(−z²) taken out does not.
    let (mut term, mut sum) = (z, z);
    for n in 1..200 {
        term *= 2.0 * z * z / f64::from(2 * n + 1);
        sum += term;
    }
    x.signum() * (2.0 / std::f64::consts::PI.sqrt() * (-z * z).exp() * sum).min(1.0)
}
