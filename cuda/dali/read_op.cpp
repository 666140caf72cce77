// fn.m3i_read: the samples of a batch, read by DALI's threads from the ranges that its rows name.
#include <algorithm>
#include <string>
#include <vector>

#include "dali/nvtx_range.h"
#include "dali/pipeline/operator/operator.h"
#include "dali/sample_record.h"

namespace m3i {
namespace {

// An open file is kept when it is removed, as a bucket's cache does, and a process may have 1,024.
constexpr size_t kOpenFiles = 64;

}  // namespace

class ReadSamples : public dali::Operator<dali::CPUBackend> {
 public:
  explicit ReadSamples(const dali::OpSpec& spec)
      : dali::Operator<dali::CPUBackend>(spec),
        options_{spec.GetArgument<int64_t>("context_length"),
                 spec.GetArgument<int64_t>("vocab_size"), spec.GetArgument<int64_t>("max_pixels"),
                 spec.GetArgument<std::string>("caption_member"),
                 spec.GetArgument<bool>("alternates")},
        files_(kOpenFiles) {}

 protected:
  bool SetupImpl(std::vector<dali::OutputDesc>&, const dali::Workspace&) override { return false; }
  bool HasContiguousOutputs() const override { return true; }

  void RunImpl(dali::Workspace& ws) override {
    const auto& rows = ws.Input<dali::CPUBackend>(0);
    const auto& paths = ws.Input<dali::CPUBackend>(1);
    const int batch = rows.num_samples();
    DALI_ENFORCE(rows.type() == DALI_INT64 && rows.sample_dim() == 1 &&
                     paths.type() == DALI_UINT8 && paths.sample_dim() == 1,
                 "m3i_read: expected rows [7] int64 and paths [n] uint8");
    std::vector<SampleRecord> records(batch);
    std::vector<std::string> names(batch), errors(batch);
    in_threads(ws, batch, [&](int i) {
      const auto path = paths.tensor<uint8_t>(i);
      const auto* start = reinterpret_cast<const char*>(path);
      names[i] = std::string(start, strnlen(start, paths.tensor_shape_span(i)[0]));
      SampleRow row;
      DALI_ENFORCE(rows.tensor_shape_span(i)[0] == kRowColumns, "m3i_read: expected 7 columns");
      std::memcpy(&row, rows.tensor<int64_t>(i), sizeof(row));
      const NvtxRange range("data.read", row.sample_id);
      // The words that graph/dali_backend.py looks for: a corrupt sample is replaced by another
      // one, a file that cannot be read ends the run.
      const std::string where = "sample " + std::to_string(row.sample_id) + " at position " +
                                std::to_string(row.position) + " in " + names[i];
      try {
        records[i] = read_sample(files_, names[i], row, options_);
      } catch (const ReadError& error) {
        errors[i] = names[i] + ": " + error.what();
      } catch (const std::exception& error) {
        errors[i] = "corrupt " + where + ": " + error.what();
      }
      names[i] = where;
    });
    // Named once and in the batch's order, whichever thread was first.
    for (const std::string& error : errors) {
      if (!error.empty()) throw std::runtime_error("m3i_read: " + error);
    }
    write(ws, records, names);
  }

 private:
  template <typename Work>
  void in_threads(dali::Workspace& ws, int batch, const Work& work) {
    auto& pool = ws.GetThreadPool();
    for (int i = 0; i < batch; ++i) pool.AddWork([&work, i](int) { work(i); }, -i);
    pool.RunAll();
  }

  void write(dali::Workspace& ws, const std::vector<SampleRecord>& records,
             const std::vector<std::string>& names) {
    const int batch = static_cast<int>(records.size());
    const int text = options_.caption_member == "tok" ? -1 : 3;
    const int alternate = !options_.alternates ? -1 : text < 0 ? 3 : 4;
    dali::TensorListShape<1> picture(batch), tokens(batch), texts(batch), others(batch);
    for (int i = 0; i < batch; ++i) {
      const auto size = [](size_t bytes) {
        return dali::TensorShape<1>(static_cast<int64_t>(bytes));
      };
      picture.set_tensor_shape(i, size(records[i].picture.second));
      tokens.set_tensor_shape(i, dali::TensorShape<1>(options_.context_length));
      texts.set_tensor_shape(i, size(records[i].text.second));
      others.set_tensor_shape(i, size(records[i].alternate.second));
    }
    const auto output = [&](int index, const dali::TensorListShape<1>& shape,
                            dali::DALIDataType type) -> auto& {
      auto& list = ws.Output<dali::CPUBackend>(index);
      list.Resize(shape, type);
      return list;
    };
    auto& pictures = output(0, picture, DALI_UINT8);
    auto& ids = output(1, tokens, DALI_INT32);
    auto& counts = ws.Output<dali::CPUBackend>(2);
    counts.Resize(dali::uniform_list_shape(batch, dali::TensorShape<0>{}), DALI_INT64);
    auto* captions = text < 0 ? nullptr : &output(text, texts, DALI_UINT8);
    auto* alternates = alternate < 0 ? nullptr : &output(alternate, others, DALI_UINT8);
    for (int i = 0; i < batch; ++i) {  // a decoder that fails names what it was given
      pictures.SetSourceInfo(i, names[i]);
      if (alternates) alternates->SetSourceInfo(i, names[i]);
    }
    in_threads(ws, batch, [&](int i) {
      const SampleRecord& record = records[i];
      std::memcpy(pictures.mutable_tensor<uint8_t>(i), record.picture.first, record.picture.second);
      auto* row = ids.mutable_tensor<int32_t>(i);
      std::fill_n(row, options_.context_length, 0);
      std::copy(record.token_ids.begin(), record.token_ids.end(), row);
      *counts.mutable_tensor<int64_t>(i) = static_cast<int64_t>(record.token_ids.size());
      if (captions && record.text.second) {
        std::memcpy(captions->mutable_tensor<uint8_t>(i), record.text.first, record.text.second);
      }
      if (alternates) {
        std::memcpy(alternates->mutable_tensor<uint8_t>(i), record.alternate.first,
                    record.alternate.second);
      }
    });
  }

  ReadOptions options_;
  OpenFiles files_;
};

}  // namespace m3i

namespace dali {

DALI_REGISTER_OPERATOR(M3iRead, m3i::ReadSamples, CPU);

DALI_SCHEMA(M3iRead)
    .DocStr(R"(Reads samples from ranges of tars, and checks them.

Inputs: rows [7] int64 (position, sample id, offset, size, CRC-32C or -1, draws of caption and
alternate) and the file's path, [n] uint8 padded with zeros. Outputs: the encoded picture, the
chosen caption's token ids [context_length] int32 and their number; then the caption's text where
`caption_member` is not "tok", and an encoded alternate with `alternates`.)")
    .NumInput(2)
    .OutputFn([](const OpSpec& spec) {
      return 3 + (spec.GetArgument<std::string>("caption_member") != "tok") +
             spec.GetArgument<bool>("alternates");
    })
    .AddArg("context_length", "Token ids of a caption at most.", DALI_INT64)
    .AddArg("vocab_size", "Token ids are below it.", DALI_INT64)
    .AddArg("max_pixels", "Pixels of a picture at most.", DALI_INT64)
    .AddOptionalArg("caption_member", "Extension of the member with captions.", std::string("tok"))
    .AddOptionalArg("alternates", "Reads an alternate picture too.", false);

}  // namespace dali
