// Ranges of the loader's operators that profilers record, in the domain "m3i_fast".
#pragma once

#include <nvtx3/nvToolsExt.h>

#include <cstdint>

namespace m3i {

// Null where no tool records, and then a range is a comparison.
inline nvtxDomainHandle_t nvtx_domain() {
  static const nvtxDomainHandle_t domain = nvtxDomainCreateA("m3i_fast");
  return domain;
}

// A range of the calling thread, from here to the end of the scope. `number` says of what it is: a
// tool shows it beside the name.
class NvtxRange {
 public:
  NvtxRange(const char* name, int64_t number) : domain_(nvtx_domain()) {
    if (domain_ == nullptr) return;
    nvtxEventAttributes_t event{};
    event.version = NVTX_VERSION;
    event.size = NVTX_EVENT_ATTRIB_STRUCT_SIZE;
    event.messageType = NVTX_MESSAGE_TYPE_ASCII;
    event.message.ascii = name;
    event.payloadType = NVTX_PAYLOAD_TYPE_INT64;
    event.payload.llValue = number;
    nvtxDomainRangePushEx(domain_, &event);
  }
  NvtxRange(const NvtxRange&) = delete;
  NvtxRange& operator=(const NvtxRange&) = delete;
  ~NvtxRange() {
    if (domain_ != nullptr) nvtxDomainRangePop(domain_);
  }

 private:
  nvtxDomainHandle_t domain_;
};

}  // namespace m3i
