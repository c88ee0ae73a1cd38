//! Random models in the shape of Qwen2.5-0.5B, quantised by llama.cpp itself.

use std::ffi::CString;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use llama_cpp_sys_2 as sys;
use tangram_testkit::{Family, GgmlType, GgufOptions, RandomModel, write_gguf};

/// Writes `qwen2-0.5b.FORMAT.gguf` for bf16, Q8_0 and Q4_K_M.
pub fn make(dir: &Path) -> Result<()> {
    std::fs::create_dir_all(dir)?;
    let model = RandomModel {
        hidden: 896,
        intermediate: 4864,
        layers: 24,
        heads: 14,
        kv_heads: 2,
        head_dim: 64,
        vocab: 151_936,
        context: 4096,
        tied: true,
        ..RandomModel::tiny(Family::Qwen2)
    };
    let source = dir.join("qwen2-0.5b.bf16.gguf");
    write_gguf(&source, &model, GgufOptions { version: 3, dtype: GgmlType::BF16 });
    for (name, kind) in [("q8_0", sys::LLAMA_FTYPE_MOSTLY_Q8_0), ("q4_k_m", sys::LLAMA_FTYPE_MOSTLY_Q4_K_M)] {
        quantise(&source, &dir.join(format!("qwen2-0.5b.{name}.gguf")), kind)?;
    }
    Ok(())
}

fn quantise(from: &Path, to: &Path, kind: sys::llama_ftype) -> Result<()> {
    let path = |path: &Path| -> Result<CString> {
        Ok(CString::new(path.to_str().context("a path that is not UTF-8")?)?)
    };
    let (from, to) = (path(from)?, path(to)?);
    // SAFETY: the call has no preconditions.
    let mut params = unsafe { sys::llama_model_quantize_default_params() };
    params.ftype = kind;
    // SAFETY: both strings end with a zero and live through the call, and so do the parameters, whose pointers are
    // the defaults.
    let status = unsafe { sys::llama_model_quantize(from.as_ptr(), to.as_ptr(), &params) };
    ensure!(status == 0, "llama.cpp could not quantise: {status}");
    Ok(())
}
