// libnccl.so.2: collectives between processes of one machine, over shared memory, with real
// results.
//
// A collective ends before its call returns, which is one of the orders that a stream allows. Every
// rank leaves what it is about to do beside its data; where two ranks differ in call, size, type or
// root, both record a fault and the call fails, where NCCL would hang or write past a buffer.
#include <nccl.h>

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <functional>

#include "libraries/nccl_ranks.h"
#include "libraries/nccl_reduce.h"
#include "runtime/null.h"

namespace {

using m3i::null::barrier;
using m3i::null::bytes_of;
using m3i::null::fault;
using m3i::null::Intent;
using m3i::null::kMailBytes;
using m3i::null::kSlotBytes;
using m3i::null::Mail;
using m3i::null::Record;
using m3i::null::reduce_parts;
using m3i::null::wait_for;

bool equal(const Intent& a, const Intent& b) {
  return std::strcmp(a.call, b.call) == 0 && a.count == b.count && a.type == b.type &&
         a.operation == b.operation && a.root == b.root;
}

std::string text_of(const Intent& intent) {
  return std::string(intent.call) + " of " + std::to_string(intent.count) + " numbers of type " +
         std::to_string(intent.type) + ", operation " + std::to_string(intent.operation) +
         ", root " + std::to_string(intent.root);
}

// Reduces a chunk of every rank's slot, in the order of ranks.
ncclResult_t reduce(const ncclComm& comm, size_t bytes, int type, int operation, char* result) {
  std::vector<const char*> parts;
  for (int rank = 0; rank < comm.ranks; ++rank) parts.push_back(comm.shared->slots[rank]);
  bool scaled = operation >= ncclNumOps;
  double scale = scaled ? comm.scales[static_cast<size_t>(operation - ncclNumOps)] : 1;
  if (reduce_parts(parts, bytes, ncclDataType_t(type), scaled ? ncclSum : ncclRedOp_t(operation),
                   scale, result)) {
    return ncclSuccess;
  }
  return fault("numbers of type " + std::to_string(type) + " cannot be reduced");
}

// Puts a chunk of every rank's slot into the rank's part of the result, of `each` bytes.
ncclResult_t gather(const ncclComm& comm, char* result, size_t each, size_t offset, size_t bytes) {
  for (int rank = 0; rank < comm.ranks; ++rank) {
    std::memcpy(result + static_cast<size_t>(rank) * each + offset, comm.shared->slots[rank],
                bytes);
  }
  return ncclSuccess;
}

// A call that waits for the end of its group.
struct Collective {
  ncclComm* comm;
  Intent intent;
  // Pieces: of `bytes` each, published one after another. `source` gives this rank's bytes of a
  // piece (null: it has none), `take` is called when all ranks have published a chunk of it.
  size_t pieces, bytes;
  std::function<const char*(size_t piece)> source;
  std::function<ncclResult_t(size_t piece, size_t offset, size_t bytes)> take;
};

struct Message {
  ncclComm* comm;
  bool sends;
  int peer;
  char* data;
  size_t bytes, done = 0;
};

thread_local int group_depth = 0;
thread_local std::vector<Collective> collectives;
thread_local std::vector<Message> messages;

ncclResult_t run(const Collective& call) {
  ncclComm& comm = *call.comm;
  comm.shared->intents[comm.rank] = call.intent;
  if (ncclResult_t error = barrier(comm, text_of(call.intent))) return error;
  for (int rank = 0; rank < comm.ranks; ++rank) {
    const Intent& other = comm.shared->intents[rank];
    if (!equal(other, call.intent)) {
      return fault("rank " + std::to_string(comm.rank) + " calls " + text_of(call.intent) +
                   ", rank " + std::to_string(rank) + " " + text_of(other));
    }
  }
  for (size_t piece = 0; piece < call.pieces; ++piece) {
    const char* own = call.source(piece);
    for (size_t offset = 0; offset < call.bytes; offset += kSlotBytes) {
      size_t bytes = std::min(kSlotBytes, call.bytes - offset);
      if (own != nullptr) std::memcpy(comm.shared->slots[comm.rank], own + offset, bytes);
      if (ncclResult_t error = barrier(comm, text_of(call.intent))) return error;
      if (ncclResult_t error = call.take(piece, offset, bytes)) return error;
      if (ncclResult_t error = barrier(comm, text_of(call.intent))) return error;
    }
  }
  return barrier(comm, text_of(call.intent));
}

// Moves what can be moved of a message now.
ncclResult_t progress(Message& message) {
  ncclComm& comm = *message.comm;
  int from = message.sends ? comm.rank : message.peer,
      to = message.sends ? message.peer : comm.rank;
  Mail& mail = comm.shared->mail[from][to];
  size_t bytes = std::min(kMailBytes, message.bytes - message.done);
  if (message.sends) {
    if (mail.sent.load() != mail.taken.load()) return ncclSuccess;
    std::memcpy(mail.data, message.data + message.done, bytes);
    mail.bytes = message.bytes;
    mail.sent.fetch_add(1);
  } else {
    if (mail.sent.load() == mail.taken.load()) return ncclSuccess;
    if (mail.bytes != message.bytes) {
      return fault("rank " + std::to_string(from) + " sends " + std::to_string(mail.bytes) +
                   " bytes, rank " + std::to_string(to) + " expects " +
                   std::to_string(message.bytes));
    }
    std::memcpy(message.data + message.done, mail.data, bytes);
    mail.taken.fetch_add(1);
  }
  message.done += bytes;
  return ncclSuccess;
}

ncclResult_t run_group() {
  std::vector<Collective> calls = std::move(collectives);
  std::vector<Message> letters = std::move(messages);
  collectives.clear();
  messages.clear();
  for (const Collective& call : calls) {
    if (ncclResult_t error = run(call)) return error;
  }
  auto unfinished = [](const Message& letter) { return letter.done < letter.bytes; };
  ncclResult_t error = ncclSuccess;
  bool all_done = wait_for([&] {
    // In order for each peer and direction: a later message waits for the earlier one.
    for (size_t i = 0; i < letters.size(); ++i) {
      bool blocked = std::any_of(
          letters.begin(), letters.begin() + static_cast<long>(i), [&](const Message& earlier) {
            return unfinished(earlier) && earlier.comm == letters[i].comm &&
                   earlier.peer == letters[i].peer && earlier.sends == letters[i].sends;
          });
      if (!blocked && unfinished(letters[i])) error = progress(letters[i]);
      if (error != ncclSuccess) return true;
    }
    return std::none_of(letters.begin(), letters.end(), unfinished);
  });
  return all_done ? error : fault("a message was not taken, or has not come");
}

ncclResult_t submit(Collective call, cudaStream_t stream) {
  using namespace m3i::null;
  Stream& on = stream_of(stream);
  Capture* capture = capture_of(on);
  {
    Record record("collective");
    record.text("call", call.intent.call).number("stream", on.id);
    record.number("bytes", static_cast<long long>(call.intent.count *
                                                  bytes_of(ncclDataType_t(call.intent.type))));
    record.number("rank", call.comm->rank).number("ranks", call.comm->ranks);
    record.text("communicator", call.comm->name);
    if (capture != nullptr) record.number("capture", static_cast<long long>(capture->id));
    record.python_line();
  }
  next_operation(on);
  add_to_capture(on, true);
  if (capture != nullptr) return ncclSuccess;
  collectives.push_back(std::move(call));
  return group_depth == 0 ? run_group() : ncclSuccess;
}

Intent intent(const char* call, size_t count, ncclDataType_t type, int operation = -1,
              int root = -1) {
  Intent result{};
  std::snprintf(result.call, sizeof result.call, "%s", call);
  result.count = count;
  result.type = type;
  result.operation = operation;
  result.root = root;
  return result;
}

ncclResult_t post(ncclComm* comm, bool sends, const void* data, size_t count, ncclDataType_t type,
                  int peer, cudaStream_t stream) {
  using namespace m3i::null;
  Stream& on = stream_of(stream);
  size_t bytes = count * bytes_of(type);
  Record("collective")
      .text("call", sends ? "ncclSend" : "ncclRecv")
      .number("stream", on.id)
      .number("bytes", static_cast<long long>(bytes))
      .number("rank", comm->rank)
      .number("ranks", comm->ranks)
      .text("communicator", comm->name)
      .python_line();
  next_operation(on);
  add_to_capture(on, true);
  if (capture_of(on) != nullptr) return ncclSuccess;
  messages.push_back({comm, sends, peer, static_cast<char*>(const_cast<void*>(data)), bytes});
  return group_depth == 0 ? run_group() : ncclSuccess;
}

}  // namespace

M3I_EXPORT ncclResult_t ncclGroupStart() {
  ++group_depth;
  return ncclSuccess;
}

M3I_EXPORT ncclResult_t ncclGroupEnd() { return --group_depth == 0 ? run_group() : ncclSuccess; }

M3I_EXPORT ncclResult_t ncclAllReduce(const void* from, void* to, size_t count, ncclDataType_t type,
                                      ncclRedOp_t operation, ncclComm_t comm, cudaStream_t stream) {
  auto source = [from](size_t) { return static_cast<const char*>(from); };
  auto take = [=](size_t, size_t offset, size_t bytes) {
    return reduce(*comm, bytes, type, operation, static_cast<char*>(to) + offset);
  };
  return submit({comm, intent("ncclAllReduce", count, type, operation), 1, count * bytes_of(type),
                 source, take},
                stream);
}

M3I_EXPORT ncclResult_t ncclReduce(const void* from, void* to, size_t count, ncclDataType_t type,
                                   ncclRedOp_t operation, int root, ncclComm_t comm,
                                   cudaStream_t stream) {
  auto source = [from](size_t) { return static_cast<const char*>(from); };
  auto take = [=](size_t, size_t offset, size_t bytes) {
    if (comm->rank != root) return ncclSuccess;
    return reduce(*comm, bytes, type, operation, static_cast<char*>(to) + offset);
  };
  return submit({comm, intent("ncclReduce", count, type, operation, root), 1,
                 count * bytes_of(type), source, take},
                stream);
}

M3I_EXPORT ncclResult_t ncclBroadcast(const void* from, void* to, size_t count, ncclDataType_t type,
                                      int root, ncclComm_t comm, cudaStream_t stream) {
  auto source = [=](size_t) {
    return comm->rank == root ? static_cast<const char*>(from) : nullptr;
  };
  auto take = [=](size_t, size_t offset, size_t bytes) {
    std::memcpy(static_cast<char*>(to) + offset, comm->shared->slots[root], bytes);
    return ncclSuccess;
  };
  return submit({comm, intent("ncclBroadcast", count, type, -1, root), 1, count * bytes_of(type),
                 source, take},
                stream);
}

M3I_EXPORT ncclResult_t ncclBcast(void* buffer, size_t count, ncclDataType_t type, int root,
                                  ncclComm_t comm, cudaStream_t stream) {
  return ncclBroadcast(buffer, buffer, count, type, root, comm, stream);
}

M3I_EXPORT ncclResult_t ncclAllGather(const void* from, void* to, size_t count, ncclDataType_t type,
                                      ncclComm_t comm, cudaStream_t stream) {
  size_t each = count * bytes_of(type);
  auto source = [from](size_t) { return static_cast<const char*>(from); };
  auto take = [=](size_t, size_t offset, size_t bytes) {
    return gather(*comm, static_cast<char*>(to), each, offset, bytes);
  };
  return submit({comm, intent("ncclAllGather", count, type), 1, each, source, take}, stream);
}

M3I_EXPORT ncclResult_t ncclReduceScatter(const void* from, void* to, size_t count,
                                          ncclDataType_t type, ncclRedOp_t operation,
                                          ncclComm_t comm, cudaStream_t stream) {
  size_t each = count * bytes_of(type);
  auto source = [=](size_t piece) { return static_cast<const char*>(from) + piece * each; };
  auto take = [=](size_t piece, size_t offset, size_t bytes) {
    if (static_cast<int>(piece) != comm->rank) return ncclSuccess;
    return reduce(*comm, bytes, type, operation, static_cast<char*>(to) + offset);
  };
  return submit({comm, intent("ncclReduceScatter", count, type, operation),
                 static_cast<size_t>(comm->ranks), each, source, take},
                stream);
}

M3I_EXPORT ncclResult_t ncclAlltoAll(const void* from, void* to, size_t count, ncclDataType_t type,
                                     ncclComm_t comm, cudaStream_t stream) {
  size_t each = count * bytes_of(type);
  auto source = [=](size_t piece) { return static_cast<const char*>(from) + piece * each; };
  auto take = [=](size_t piece, size_t offset, size_t bytes) {
    if (static_cast<int>(piece) != comm->rank) return ncclSuccess;
    return gather(*comm, static_cast<char*>(to), each, offset, bytes);
  };
  return submit({comm, intent("ncclAlltoAll", count, type), static_cast<size_t>(comm->ranks), each,
                 source, take},
                stream);
}

M3I_EXPORT ncclResult_t ncclSend(const void* from, size_t count, ncclDataType_t type, int peer,
                                 ncclComm_t comm, cudaStream_t stream) {
  return post(comm, true, from, count, type, peer, stream);
}

M3I_EXPORT ncclResult_t ncclRecv(void* to, size_t count, ncclDataType_t type, int peer,
                                 ncclComm_t comm, cudaStream_t stream) {
  return post(comm, false, to, count, type, peer, stream);
}
