//! The last stage on a GPU: logits, vectors or scores of the rows that want them.

use tangram_checkpoint::{Output, Pooling, ScoreActivation};

use super::executor::ExecuteError;
use super::forward::{Input, Needs, Step, numbers};
use super::{ActivateArguments, CapArguments, NormArguments, PoolArguments, RowsOut, activation, launch};
use crate::model::{LinearTensors, Scorer};

impl Step<'_> {
    /// The last stage: logits of the rows that want them, or one vector per chunk.
    pub(super) fn head(&mut self) -> Result<(), ExecuteError> {
        match self.model.spec.output {
            Output::Logits { .. } => self.logits(),
            Output::Embedding { pooling, normalise } => self.pool(pooling, normalise),
            Output::Score { activation } => self.score(activation),
        }
    }

    /// What the scorer makes of the state of each chunk's first token.
    fn score(&mut self, by: ScoreActivation) -> Result<(), ExecuteError> {
        let Some(Scorer { pooler, classifier }) = &self.model.scorer else { return Ok(()) };
        let (rows, hidden) = (self.pass.output_rows, self.model.spec.hidden);
        let (x, gather) = (self.pass.memory.x.address(), self.table(self.pass.layout.output_rows));
        let width = hidden as u32;
        let out = self.memory().h.reserve(rows, hidden, Needs::of([pooler]))?;
        let activation = activation::NONE;
        self.activate(rows, &ActivateArguments { x, up: 0, gather, out, width, activation })?;
        let pooled = numbers(&mut self.memory().block, rows * hidden)?;
        self.product(Input { rows: out, columns: hidden, tokens: rows }, pooler, pooled, false)?;
        let out = self.memory().gate.reserve(rows, hidden, Needs::of([classifier]))?;
        let activation = activation::TANH;
        self.activate(rows, &ActivateArguments { x: pooled, up: 0, gather: 0, out, width, activation })?;
        let scores = numbers(&mut self.memory().output, rows)?;
        self.product(Input { rows: out, columns: hidden, tokens: rows }, classifier, scores, false)?;
        if by == ScoreActivation::Sigmoid {
            let out = RowsOut { plain: scores, ..RowsOut::default() };
            let (width, activation) = (1, activation::SIGMOID);
            self.activate(rows, &ActivateArguments { x: scores, up: 0, gather: 0, out, width, activation })?;
        }
        Ok(())
    }

    fn logits(&mut self) -> Result<(), ExecuteError> {
        let model = self.model;
        let (rows, hidden) = (self.pass.output_rows, model.spec.hidden);
        let Some(output) = model.output else { return Ok(()) };
        if rows == 0 {
            return Ok(());
        }
        let linear = LinearTensors { weight: output, bias: None };
        let gather = self.table(self.pass.layout.output_rows);
        let x = self.pass.memory.x.address();
        let out = self.memory().h.reserve(rows, hidden, Needs::of([&linear]))?;
        match &model.final_norm {
            Some(norm) => {
                let arguments = NormArguments { gather, ..self.norm_arguments(x, out, norm)? };
                self.normalise(rows, &arguments)?;
            }
            None => {
                let (width, activation) = (hidden as u32, activation::NONE);
                self.activate(rows, &ActivateArguments { x, up: 0, gather, out, width, activation })?;
            }
        }
        let logits = numbers(&mut self.memory().output, rows * output.rows)?;
        self.product(Input { rows: out, columns: hidden, tokens: rows }, &linear, logits, false)?;
        if let Some(cap) = model.spec.logit_cap {
            let elements = rows * output.rows;
            let arguments = CapArguments { x: logits, elements: elements as u64, cap, unused: 0 };
            // SAFETY: the output has so many elements.
            unsafe { self.kernels.cap(launch::elements(elements), &arguments) }?;
        }
        self.select(logits, output.rows)
    }

    fn pool(&mut self, pooling: Pooling, unit_length: bool) -> Result<(), ExecuteError> {
        let (model, sequences) = (self.model, self.pass.places.len());
        let hidden = model.spec.hidden;
        if let Some(norm) = &model.final_norm {
            self.normalise_in_place(norm)?;
        }
        let arguments = PoolArguments {
            x: self.pass.memory.x.address(),
            sequences: self.table(self.pass.layout.sequence_rows),
            out: numbers(&mut self.memory().output, sequences * hidden)?,
            width: hidden as u32,
            mean: u32::from(pooling == Pooling::Mean),
            unit_length: u32::from(unit_length),
            unused: 0,
        };
        // SAFETY: sequences are of rows of the batch; the output has a row for each.
        unsafe { self.kernels.pool(launch::rows(sequences, 256), &arguments) }?;
        Ok(())
    }
}
